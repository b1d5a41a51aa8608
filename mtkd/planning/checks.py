"""Refuse a run by its configuration alone, before data or weights are read.

Each rule has one place:

    fields, types, references to earlier stages         pydantic (`mtkd.config`)
    names, options, files, columns, heads, metrics      here: everything that `mtkd validate` sees
    layers, widths, vocabularies, caches, labels        the plan (`mtkd.planning.specify`, `labels`, `caches`)
    weights, tokenizers of folders, classes in the data the build (`mtkd.running.build`)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mtkd.config import RANDOM_TOKENS, ModelConfig, OwnTeacher, RunConfig, StageConfig, StageRef
from mtkd.config.match import Match
from mtkd.config.read import Location, dotted
from mtkd.data.files import columns_of
from mtkd.data.paths import find_files
from mtkd.data.sources import check_source
from mtkd.data.tasks import TaskSpec
from mtkd.data.transforms import TRANSFORMS
from mtkd.engine.launch import num_processes
from mtkd.errors import UserError, in_url, masked
from mtkd.losses.spec import LOSSES
from mtkd.methods.rows import placed_rows, stage_rows
from mtkd.models.info import PRE_TRAINING
from mtkd.models.vocabulary import compressed_teacher, compressed_twice
from mtkd.objective.compile import at_row
from mtkd.planning.answers import check_answers
from mtkd.planning.generate import check_generate
from mtkd.planning.places import in_file, placed
from mtkd.planning.rollouts import check_rollout
from mtkd.planning.stages import (
    can_teach,
    does_task,
    head_for,
    model_name,
    never_trained,
    scored_models,
)
from mtkd.planning.teachers import check_teachers
from mtkd.planning.teaching import heads_read
from mtkd.pool import BACKENDS
from mtkd.registry import TASKS, check_options, load_plugins
from mtkd.weightings.base import Weighting
from mtkd.weightings.make import check_weighting, stage_reads
from mtkd.weightings.spec import WEIGHTINGS


def check(config: RunConfig) -> None:
    """Check plug-ins, names, options and data files.

    Raises:
        UserError: at the first thing that is wrong.
    """
    with in_file(config):
        load_plugins(config.plugins, config.base)
        check_teachers(config)
        for name, data in config.data.items():
            with placed(data=f"data.{name}"):
                check_source(data, config.base, f"data.{name}")
        _check_registered(config)
        _check_evaluation(config)
        check_answers(config)
        _check_vocabularies(config)
        _check_selection(config)


def check_credentials(config: RunConfig) -> None:
    """Refuse credentials in a URL, in any text of the configuration: run.yaml would keep them.

    Raises:
        UserError: naming the place; the text is masked.
    """
    for location, text in _texts(config.model_dump(mode="json", exclude_unset=True), ()):
        if in_url(text):
            raise UserError(
                "a URL with credentials: run.yaml and other files of the run would keep them",
                where=dotted(location),
                found=masked(text),
                todo="take them out, and make new ones if the file was shared: "
                "models and data of the hub are read with the token of `hf auth login` or HF_TOKEN",
            )


def _texts(value: object, location: Location) -> Iterator[tuple[Location, str]]:
    """Every text in a value, names of keys included, with its place."""
    if isinstance(value, str):
        yield location, value
    for key, child in value.items() if isinstance(value, dict) else ():
        yield location, str(key)
        yield from _texts(child, (*location, str(key)))
    for number, child in enumerate(value if isinstance(value, list) else ()):
        yield from _texts(child, (*location, number))


def _check_registered(config: RunConfig) -> None:
    """Check every registered name and option of the run, before anything is loaded.

    Raises:
        UserError: at the first unknown name or option.
    """
    for name, data in config.data.items():
        TASKS.find(data.task, f"data.{name}.task")
    for name, stage in config.stages.items():
        where = f"stages.{name}"
        _check_labels(config, stage, where)
        data_name = config.data_name(stage.data)
        rows = placed_rows(stage, config.data[data_name], where)
        for place, row in rows.items():
            with at_row(place):
                check_options(row.options, LOSSES.find(row.loss, "@row.loss").options(), "@row")
        token_level = TASKS.find(config.data[data_name].task).token_level
        _check_micro_batches(config, stage, rows, where)
        check_weighting(stage, tuple(rows.values()), where, token_level=token_level)
        _check_heads(config, name)
        _check_transforms(stage, f"{where}.transforms")
        check_rollout(stage, config.data[data_name], TASKS.find(config.data[data_name].task), rows, where)
        if "route" in stage_reads(stage, where, token_level=token_level).names:
            _check_route(config, data_name)
        _check_text(config, name)
        written = stage.write is not None or (stage.rollout is not None and stage.rollout.share == 1)
        check_generate(stage, config.data[data_name], config.base, where)
        _check_answers(config, data_name, f"{where}.data", written=written)
        task = config.data[data_name].task
        if stage.per == "token" and not TASKS.find(task).token_level:
            raise UserError(
                f"task '{task}' has one target per example, so one weight per teacher and example",
                where=f"{where}.per",
                found="token",
                allowed="example",
            )


def _check_micro_batches(config: RunConfig, stage: StageConfig, rows: Mapping[str, Match], where: str) -> None:
    """Refuse micro-batches of one example where a loss compares the examples of a micro-batch."""
    batch, ranks = stage.batch, num_processes(config.engine)
    over = [row.loss for row in rows.values() if "batch" in LOSSES[row.loss].needs]
    if over and batch.sequences is not None and batch.sequences < 2 * ranks * batch.accumulate:
        raise UserError(
            f"loss '{over[0]}' compares the examples of a micro-batch, and some have fewer than two",
            where=f"{where}.batch",
            found=f"{batch.sequences} sequences in {ranks} x {batch.accumulate} micro-batches (processes x accumulate)",
            allowed=f"sequences of {2 * ranks * batch.accumulate} or more; larger micro-batches teach more",
        )


def _check_transforms(stage: StageConfig, where: str) -> None:
    """Check names and options of transforms, and refuse cached teachers: their answers are for the text of the data."""
    for i, setting in enumerate(stage.transforms):
        TRANSFORMS.find(setting.name, f"{where}[{i}].name").check(setting.options, f"{where}[{i}]")
    stored = [teacher.name for teacher in stage.teachers if BACKENDS[teacher.backend].stored]
    if stage.transforms and stored:
        raise UserError(
            "a cached teacher answered for the text of the data, and a transform may write another one",
            where=where,
            found=f"teacher '{stored[0]}' is cached",
            todo="let the teacher run, or drop transforms",
        )


def _check_heads(config: RunConfig, name: str) -> None:
    """Refuse to read predictions of an earlier stage's model where that stage gave it another head, or trained none."""
    stage, read = config.stages[name], heads_read(config, name)
    for i, teacher in enumerate(stage.teachers):
        ref = teacher.model.stage
        if ref is None or isinstance(teacher, OwnTeacher):  # which reads its model in its own way
            continue
        where, earlier = f"stages.{name}.teachers[{i}]", ref.stage
        earlier_head, head = (head_for(config, s.data) for s in (config.stages[earlier], stage))
        if not can_teach(earlier_head, head) and (read or head == PRE_TRAINING):
            raise UserError(
                f"stage '{earlier}' made its model for another task: here its predictions would come from a new head",
                where=where,
                found=f"{earlier_head} on data '{config.data_name(config.stages[earlier].data)}'",
                allowed=head,
                todo="fine-tune the teacher on this stage's data first, or compare hidden states and attention alone",
            )
        if read and never_trained(config, ref.model):
            raise UserError(
                f"no row of stage '{earlier}' compares logits: its model never learns to predict",
                where=where,
                found="its predictions are read here",
                todo="fine-tune it first: a `kind: finetune` stage, or compare hidden states and attention alone",
            )


def _check_text(config: RunConfig, name: str) -> None:
    """Refuse a weighting that reads the text left to right where no teacher does, or after a prompt without one."""
    stage, where = config.stages[name], f"stages.{name}"
    data_name, named = config.data_name(stage.data), stage.weighting.name
    data = config.data[data_name]
    task = TASKS.find(data.task)
    reads = stage_reads(stage, where, token_level=task.token_level)
    if reads.text and not task.left_to_right:
        raise UserError(
            f"weighting '{named}' reads how probable each teacher holds the tokens of the text so far, and only causal "
            "language models say that",
            where=f"{where}.weighting",
            found=f"task '{data.task}'",
            allowed=[spec.name for spec in TASKS.values() if spec.left_to_right],
            todo="choose a weighting that reads something else: `mtkd ls weightings`",
        )
    weighting: type[Weighting] = WEIGHTINGS[named].cls
    if reads.text and weighting.after_prompt and stage.per == "example" and not data.prompted:
        raise UserError(
            f"one weight per example of '{named}' is that after its prompt, and these texts have none",
            where=f"{where}.per",
            found=f"example, data '{data_name}' without prompt",
            todo="set per: token",
        )


def _check_answers(config: RunConfig, name: str, where: str, *, written: bool = False) -> None:
    """Refuse prompts without answers where an answer is read, unless the student writes all of them."""
    if config.data[name].prompts_only and not written:
        raise UserError(
            "answers are learned or scored here, and these data are prompts alone",
            where=where,
            found=f"data.{name}.prompts_only: true",
            todo="drop prompts_only and name the column of the answers, or name other data here; a distill stage may "
            "have the student write every answer: rollout: {share: 1}",
        )


def _check_route(config: RunConfig, name: str) -> None:
    """Refuse data without the column that names each example's teacher."""
    data = config.data[name]
    files = find_files(data, config.base, f"data.{name}") if data.source == "files" else {}
    columns = columns_of(files["train"][0]) if "train" in files else None
    if data.source == RANDOM_TOKENS or (columns is not None and data.teacher not in columns):
        raise UserError(
            "weighting 'route' reads the teacher of each example from a column, and these data have none of that name",
            where=f"data.{name}.teacher",
            found=data.teacher,
            allowed=columns or "data with such a column",
        )


def _check_labels(config: RunConfig, stage: StageConfig, where: str) -> None:
    """Refuse a stage that reads the labels of made-up texts."""
    name = config.data_name(stage.data)
    data = config.data[name]
    if data.labelled:
        return
    readers = [f"row {row.feature}:{row.loss}" for row in stage_rows(stage, data, where) if row.target == "labels"]
    if WEIGHTINGS.find(stage.weighting.name, f"{where}.weighting.name").needs_labels:
        readers.append(f"weighting '{stage.weighting.name}'")
    if readers:
        raise UserError(
            f"the tokens of data '{name}' are made up: its labels mean nothing",
            where=where,
            found=", ".join(readers),
            todo="distil without label rows (method options: {hard: 0}) and with a weighting that needs no labels",
        )


def _check_vocabularies(config: RunConfig) -> None:
    """Refuse to compress a vocabulary twice, and teachers of tokens that have a compressed one."""
    compressed: set[str] = set()
    for name, stage in config.stages.items():
        task = TASKS.find(config.data_of(stage).task)
        for i, teacher in enumerate(stage.teachers):
            if task.token_level and _earlier_model(teacher.model) in compressed:
                raise compressed_teacher(teacher.model.path or "", f"stages.{name}.teachers[{i}]")
        for role, model in stage.trained.items():
            goes_on = _earlier_model(model) in compressed
            if goes_on and model.vocabulary is not None:
                raise compressed_twice(f"{stage.place(name, role)}.vocabulary")
            if goes_on or model.vocabulary is not None:
                compressed.add(model_name(name, stage, role))


def _earlier_model(model: ModelConfig) -> str:
    """The name of a model that an earlier stage makes; "" for any other model."""
    return "" if model.stage is None else model.stage.model


def _check_evaluation(config: RunConfig) -> None:
    """Refuse to score a model on a task that its stage gave it no head for.

    Raises:
        UserError: naming the stage and its data.
    """
    settings = config.evaluate
    name = config.data_name(settings.data)
    data, split = config.data[name], settings.split
    held_out = split == "validation" and data.validation_share > 0
    if not config.models and not settings.ensembles:
        return  # a run of caches alone makes no model to score
    _check_answers(config, name, "evaluate.data")
    splits = list(find_files(data, config.base, f"data.{name}")) if data.source == "files" else []
    if data.source == RANDOM_TOKENS or (data.source == "files" and split not in splits and not held_out):
        raise UserError(
            f"data '{name}' has no {split} split to score on",
            where="evaluate.split",
            found=split,
            allowed=splits or "real data",
            todo="set evaluate.data and evaluate.split",
        )
    named = [("stages", s) for s in settings.stages] + [("ensembles", s) for s in settings.ensembles]
    for place, stage in named:
        if place == "stages" and never_trained(config, stage):
            raise UserError(
                f"no row of stage '{stage}' compares logits: its model never learns to predict, and has no score",
                where=f"evaluate.{place}",
                found=stage,
                todo="drop the stage here, or fine-tune its model in a further stage",
            )
        if not does_task(config, stage):
            raise UserError(
                f"the models of stage '{stage}' cannot be scored on data '{name}' (task {config.data[name].task})",
                where=f"evaluate.{place}",
                found=f"trained on data '{config.data_name(config.stages[stage].data)}'",
                allowed=[s for s in config.stages if does_task(config, s)] or "no stage of this run",
                todo="drop the stage, or set evaluate.data to data of its task",
            )
    scored = scored_models(config)
    if not scored and not any(does_task(config, model) for model in config.models):
        raise UserError(f"no stage of this run does the task of data '{name}'", where="evaluate.data", found=name)
    for i, pair in enumerate(settings.comparisons):
        for side in (pair.candidate, pair.baseline):
            if StageRef.named(side).stage in config.stages and side not in scored:
                raise UserError(
                    f"'{side}' is not scored: its task is not that of evaluate.data, or it never learns to predict",
                    where=f"evaluate.comparisons[{i}]",
                    allowed=scored,
                )


def _check_selection(config: RunConfig) -> None:
    """Refuse a stage that selects by a metric its task lacks, or without a validation split.

    Raises:
        UserError: naming what is missing.
    """
    for name, stage in config.stages.items():
        if not stage.selects:
            continue
        data_name = config.data_name(stage.data)
        data = config.data[data_name]
        task: TaskSpec = TASKS.find(data.task, f"data.{data_name}.task")
        if stage.selects not in (allowed := ("loss", *task.metrics, *task.regression_metrics)):
            raise UserError(
                f"task '{data.task}' has no such metric",
                where=f"stages.{name}.{'early_stop.metric' if stage.early_stop else 'export_metric'}",
                found=stage.selects,
                allowed=allowed,
            )
        _check_answers(config, data_name, f"stages.{name}.{'early_stop' if stage.early_stop else 'export'}")
        if data.source == RANDOM_TOKENS:
            raise UserError(
                "random tokens have no validation split to choose by",
                where=f"stages.{name}",
                found=f"data '{data_name}'",
                todo="drop early_stop and export: best",
            )
        files = find_files(data, config.base, f"data.{data_name}") if data.source == "files" else {}
        if data.source == "files" and "validation" not in files and not data.validation_share:
            raise UserError(
                "there is no validation split to choose by",
                where=f"data.{data_name}.files",
                found=", ".join(files),
                todo="add files.validation or validation_share, or drop early_stop and export: best",
            )
