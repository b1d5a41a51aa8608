"""What can be refused of a run before any data or weights are read: names, options, and what does not fit together."""

from __future__ import annotations

from mtkd.chain import does_task, scored_models, stage_of
from mtkd.config import RunConfig, StageConfig
from mtkd.data.sources import check_source
from mtkd.data.tasks import TaskSpec
from mtkd.errors import UserError
from mtkd.mix import stage_rows
from mtkd.models.vocabulary import compressed_teacher, compressed_twice
from mtkd.registry import LOSSES, TASKS, WEIGHTINGS, check_options, load_plugins
from mtkd.weightings.base import StageFacts
from mtkd.weightings.make import check_weighting, make_weighting


def check(config: RunConfig) -> None:
    """Plug-ins, names, options and data files: everything that can be checked without reading data or weights.

    Raises:
        UserError: at the first thing that is wrong.
    """
    load_plugins(config.plugins, config.base)
    _check_registered(config)
    _check_evaluation(config)
    _check_vocabularies(config)
    for name, data in config.data.items():
        check_source(data, config.base, f"data.{name}")
    _check_selection(config)


def _check_registered(config: RunConfig) -> None:
    """Every registered name and option a run uses, before anything is loaded.

    Raises:
        UserError: at the first unknown name or option.
    """
    for name, data in config.data.items():
        TASKS.find(data.task, f"data.{name}.task")
    for name, stage in config.stages.items():
        where = f"stages.{name}"
        _check_labels(config, stage, where)
        rows = stage_rows(stage, config.data[config.data_name(stage.data)], where)
        for position, row in enumerate(rows):
            spec = LOSSES.find(row.loss, f"{where}.match[{position}].loss")
            check_options(row.options, spec.options(), f"{where}.match[{position}]")
        facts = StageFacts.stand_in(tuple(t.name for t in stage.teachers))
        check_weighting(make_weighting(stage.weighting, facts, f"{where}.weighting"), stage, rows, where)


def _check_labels(config: RunConfig, stage: StageConfig, where: str) -> None:
    """Refuse whatever reads the labels of made-up texts."""
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
    """A model that a stage made with a compressed vocabulary is not compressed again, and teaches no tokens."""
    compressed: set[str | None] = set()
    for name, stage in config.stages.items():
        task = TASKS.find(config.data[config.data_name(stage.data)].task)
        for i, teacher in enumerate(stage.teachers):
            if task.token_level and stage_of(teacher.model.path) in compressed:
                raise compressed_teacher(teacher.model.path or "", f"stages.{name}.teachers[{i}]")
        for role, model in stage.trained.items():
            goes_on = stage_of(model.path) in compressed
            if goes_on and model.vocabulary is not None:
                raise compressed_twice(f"stages.{name}.{role}.vocabulary")
            if goes_on or model.vocabulary is not None:
                compressed.add(name)


def _check_evaluation(config: RunConfig) -> None:
    """Refuse to score a model on a task that its stage gave it no head for.

    Raises:
        UserError: naming the stage and its data.
    """
    settings = config.evaluate
    name = config.data_name(settings.data)
    named = [("stages", s) for s in settings.stages] + [("ensembles", s) for s in settings.ensembles]
    for place, stage in named:
        if not does_task(config, stage):
            raise UserError(
                f"the models of stage '{stage}' cannot be scored on data '{name}' (task {config.data[name].task})",
                where=f"evaluate.{place}",
                found=f"trained on data '{config.data_name(config.stages[stage].data)}'",
                allowed=[s for s in config.stages if does_task(config, s)] or "no stage of this run",
                todo="drop the stage, or set evaluate.data to data of its task",
            )
    scored = scored_models(config)
    if not scored:
        raise UserError(f"no stage of this run does the task of data '{name}'", where="evaluate.data", found=name)
    for i, pair in enumerate(settings.comparisons):
        for side in (pair.candidate, pair.baseline):
            if side.partition("/")[0] in config.stages and side not in scored:
                raise UserError(
                    f"'{side}' is not scored: its task is not that of evaluate.data",
                    where=f"evaluate.comparisons[{i}]",
                    allowed=scored,
                )


def _check_selection(config: RunConfig) -> None:
    """The metric that stops a stage or chooses its step exists, and so does the validation split, as far as known.

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
        if data.source == "files" and "validation" not in data.files and not data.validation_share:
            raise UserError(
                "there is no validation split to choose by",
                where=f"data.{data_name}.files",
                found=", ".join(data.files),
                todo="add files.validation or validation_share, or drop early_stop and export: best",
            )
