"""`mtkd.plan`: everything resolved and checked, nothing trained and no weight loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import torch

from mtkd.config import DataConfig, RunConfig, StageConfig
from mtkd.data.everyrow import check_routes
from mtkd.data.tasks import TaskSpec
from mtkd.engine.folder import RunDir
from mtkd.engine.launch import num_processes, shown_command
from mtkd.engine.precision import choose, decided, warning, with_precision
from mtkd.errors import UserError
from mtkd.methods.rows import placed_rows
from mtkd.models.info import ModelInfo, check_packing
from mtkd.objective.cofinetune import check_members
from mtkd.objective.compile import compile_rows
from mtkd.planning.budget import Sketch, find_limits, stage_memory
from mtkd.planning.cachefolder import CacheFacts, check_precision_of, check_tokenizer_of, read_facts
from mtkd.planning.caches import (
    bytes_per_token,
    check_cacheable,
    check_cached,
    check_layers,
    check_same_data,
    compressed_from_cache,
    content_of,
    describe,
    train_tokens,
)
from mtkd.planning.checks import check, check_credentials
from mtkd.planning.data import DataFacts, DataReader
from mtkd.planning.dataview import PlannedData, view
from mtkd.planning.footprint import CachedShape, Shape
from mtkd.planning.labels import check_labelled, with_teachers_classes
from mtkd.planning.ladder import Look, complete
from mtkd.planning.locate import (
    missing_models,
)
from mtkd.planning.models import PlannedModels, with_open_labels
from mtkd.planning.places import in_file
from mtkd.planning.stages import model_name, needed_stages, never_trained, stage_values
from mtkd.planning.table import SKIPPED, Plan, PlannedModel, PlannedStage, of_cache, row_text, with_consequences
from mtkd.planning.teachers import check_backends
from mtkd.planning.teaching import heads_read
from mtkd.pool import BACKENDS
from mtkd.pool.backends import check_room
from mtkd.pool.sizes import Place, TeacherSize
from mtkd.registry import TASKS, load_plugins
from mtkd.weightings.make import stage_reads


def resolve(config: RunConfig) -> RunConfig:
    """The run with every stage of its chain, and a decided precision; else as it is.

    Shapes that depend on other models are derived.

    Raises:
        UserError: a shape cannot be derived, or the stages that result are not valid.
    """
    with in_file(config):
        check_credentials(config)
        config = with_precision(config)
        load_plugins(config.plugins, config.base)
        check_backends(config)
        return complete(config, lambda stand_in: _Planner(stand_in, states=False).look())


def plan(
    config: RunConfig, *, memory: bool = False, reader: DataReader | None = None, redo: Collection[str] = ()
) -> Plan:
    """Resolve and check a run: models from their configurations, rows against both sides, tokenizers against another.

    Args:
        memory: also say what each stage needs of memory and disk; a second or so per stage, for models of 10B up to
            a minute: every change that might help is planned too.
        reader: of the data entries, which the run goes on with.
        redo: stages that are to be made again: the run is planned as it would be then.
    Raises:
        UserError: whatever would fail later for a reason that can be known now.
    """
    with in_file(config):
        return _plan(config, memory, reader, redo)


def _plan(config: RunConfig, memory: bool, reader: DataReader | None, redo: Collection[str]) -> Plan:
    precision = choose(config, planned=memory)
    config = resolve(decided(config, precision.precision))
    check(config)
    reader = reader or DataReader(config.base)
    config = with_teachers_classes(config, reader)
    planner = _Planner(config, reader, redo)
    facts = {name: planner.models.facts(data) for name, data in config.data.items()}
    planner.models.check_chats()
    planner.models.check_commands()
    stages = with_consequences([planner.stage(name) for name in config.stages])
    if memory:
        stages = planner.with_memory(stages)
    planner.models.check_scored()
    check_labelled(config, facts)
    planner.check_routes(facts, reader)
    data = planner.data(facts, reader)
    engine = config.engine
    kind = f"{engine.kind}, {num_processes(engine)} process(es), {engine.decided_precision}"
    if engine.kind == "deepspeed":
        kind += f", ZeRO {engine.zero_stage}"
    missing = [*missing_models(config), *(each.not_here for each in facts.values() if each.not_here)]
    command, notes = (
        " ".join(shown_command(engine)),
        [str(precision), *filter(None, [warning(engine), _few_resamples(config)])],
    )
    return Plan(config.name, str(config.folder), kind, command, stages, missing, notes, data)


def _few_resamples(config: RunConfig) -> str:
    """What is said when no comparison could reach a verdict with the resamples of the configuration."""
    settings = config.evaluate
    needed = settings.enough_resamples(len(settings.comparisons))
    if needed == settings.resamples:
        return ""
    few = f"evaluate.resamples: {settings.resamples:,} are too few for {len(settings.comparisons)} comparisons"
    return f"{few}: {needed:,} are taken, more with domains"


class _Planner:
    def __init__(
        self, config: RunConfig, reader: DataReader | None = None, redo: Collection[str] = (), states: bool = True
    ) -> None:
        self._to_do = set(redo) if states else set(config.stages)
        self.config = config
        self.models = PlannedModels(config, reader)
        self._cached: dict[str, CacheFacts] = {}  # what cache stages will have made
        self._sketches: dict[str, Sketch] = {}

    def data(self, facts: Mapping[str, DataFacts], reader: DataReader) -> list[PlannedData]:
        """The data entries as the stages will see them."""
        tokenizer = None if self.models.stands_in else self.models.tokenizer
        return [
            view(name, data, facts[name], None if facts[name].not_here else reader.raw(data), tokenizer)
            for name, data in self.config.data.items()
        ]

    def check_routes(self, facts: Mapping[str, DataFacts], reader: DataReader) -> None:
        """Refuse rows without a teacher of the stage where its weighting reads one from them."""
        for name, stage in self.config.stages.items():
            data, where = self.config.data_name(stage.data), f"stages.{name}.weighting"
            teachers = tuple(teacher.name for teacher in stage.teachers)
            token_level = TASKS.find(self.config.data[data].task).token_level
            reads = stage_reads(stage, f"stages.{name}", token_level=token_level)
            if "route" in reads.names and not facts[data].not_here:
                raw = reader.raw(self.config.data[data])
                check_routes(raw.splits["train"], raw.origin("train"), self.config.data[data], teachers, where)

    def stage(self, name: str) -> PlannedStage:
        stage, where = self.config.stages[name], f"stages.{name}"
        data = self.config.data[self.config.data_name(stage.data)]
        task = TASKS.find(data.task, f"data.{stage.data}.task")
        auto_class = task.class_for(data)
        if stage.kind == "cache":
            return self._cache_stage(name, stage, auto_class, where)
        models = [(role, m, self.models.of(stage, m, stage.place(name, role))) for role, m in stage.trained.items()]
        own = len(models)
        self.models.made |= {model_name(name, stage, role): made for role, _, made in models}
        for role, model, made in models:
            if model.vocabulary is not None or self.models.vocabulary(model) is not None:
                self.models.compressed[model_name(name, stage, role)] = made.vocab_size
            self.models.check_tokenizer(model, stage.place(name, role), task, teaches=False)
        sized = [self.models.sized(role, model, made, data, auto_class) for role, model, made in models]
        caches = self._caches(stage, data, auto_class, where)
        live: dict[str, Shape] = {}
        for i, teacher in enumerate(stage.teachers):
            place = f"{where}.teachers[{i}]"
            if teacher.name in caches:
                sized.append(of_cache(teacher, caches[teacher.name]))
                continue
            made = self.models.of_teacher(stage, teacher, auto_class, place, heads_read(self.config, name))
            sized.append(self.models.sized(teacher.name, teacher.model, made, data, auto_class))
            live[teacher.name] = self.models.shape(made, auto_class, teacher.model)
            self.models.check_tokenizer(teacher.model, place, task, teaches=True)
            BACKENDS[teacher.backend].check(teacher, place)
        backends = [""] * own + [teacher.backend for teacher in stage.teachers]
        planned = [replace(model, backend=backend) for (model, _), backend in zip(sized, backends, strict=True)]
        infos = [info for _, info in sized]
        if stage.batch.packing:
            _check_packed(task, planned, infos, f"{where}.batch.packing")
        if stage.members:
            check_members({p.role: info for p, info in sized}, f"{where}.members")
        rows = compile_rows(
            placed_rows(stage, data, where, self.models.facts(data).kind == "number"),
            infos[0],
            {p.role: info for p, info in sized[own:]},
            token_level=task.token_level,
            regression=_regression(task, self.models.facts(data)),
        )
        check_cached(stage, rows, caches, token_level=task.token_level, where=where)
        if caches and task.token_level and name in self.models.compressed:
            raise compressed_from_cache(next(iter(caches)), f"{where}.student.vocabulary")
        texts = [row_text(row.match.weight, row.key, row.pairs) for row in rows]
        shapes = {role: self.models.shape(made, auto_class, model, name) for role, model, made in models}
        teachers = {
            t.name: live.get(t.name) or CachedShape(caches[t.name].content, caches[t.name].info) for t in stage.teachers
        }
        self._sketches[name] = Sketch(
            name,
            stage,
            shapes,
            teachers,
            self._sizes(stage, planned[own:], where),
            rows,
            task.token_level,
            sum(p.weight_bytes for p in planned[:own]),
            max(info.vocabulary if task.token_level else info.num_labels for info in infos),
            data.max_length,
        )
        return PlannedStage(
            name,
            stage.kind,
            self._state(name),
            needed_stages(stage),
            planned,
            texts,
            stage.steps,
            self._tokens(stage, data.max_length),
            notes=self._notes(name),
        )

    def _notes(self, name: str) -> tuple[str, ...]:
        """What was decided of a stage's models."""
        prefix = f"stages.{name}."
        places = {place: notes for place, notes in self.models.notes.items() if place.startswith(prefix)}
        found = [f"{place}: {note}" for place, notes in places.items() for note in notes]
        if self.config.stages[name].kind == "distill" and never_trained(self.config, name):
            found.append("no row compares logits: the model never learns to predict here, and is not scored")
        return tuple(found)

    def _cache_stage(self, name: str, stage: StageConfig, auto_class: str, where: str) -> PlannedStage:
        """The teachers of a cache stage, what is kept of each, and how large that may become."""
        data = self.config.data[self.config.data_name(stage.data)]
        check_cacheable(stage, data, where)
        task = TASKS.find(data.task)
        token_level = task.token_level
        planned, texts = list[PlannedModel](), list[str]()
        shapes: dict[str, Shape | CachedShape] = {}
        size, tokens = 0.0, train_tokens(data, self.config.base)
        for i, teacher in enumerate(stage.teachers):
            place = f"{where}.teachers[{i}]"
            made = self.models.of_teacher(stage, teacher, auto_class, place, heads_read(self.config, name))
            self.models.check_tokenizer(teacher.model, place, task, teaches=True)
            model, info = self.models.sized(teacher.name, teacher.model, made, data, auto_class)
            columns = self.models.num_ids if token_level else info.num_labels
            content = content_of(stage.cache, token_level=token_level, columns=columns, seed=self.config.seed)
            check_layers(content, info, f"{where}.cache", teacher.name)
            self.models.made[f"{name}/{teacher.name}"] = made
            self._cached[f"{name}/{teacher.name}"] = CacheFacts(content, info, model.parameters, f"stages.{name}")
            planned.append(replace(model, backend=teacher.backend))
            shapes[teacher.name] = self.models.shape(made, auto_class, teacher.model)
            size += bytes_per_token(content, info)
            text = f"{teacher.name}: {describe(content, info, tokens)}"
            remark = BACKENDS[teacher.backend].remark(_per_step(stage, data.max_length))
            texts.append("; ".join(filter(None, (text, remark))))
        self._sketches[name] = Sketch(
            name,
            stage,
            {},
            shapes,
            self._sizes(stage, planned, where),
            [],
            token_level,
            0,
            columns,
            data.max_length,
            None if tokens is None else size * tokens,
        )
        return PlannedStage(
            name,
            stage.kind,
            self._state(name),
            needed_stages(stage),
            planned,
            texts,
            None,
            None,
            notes=self._notes(name),
        )

    def _caches(self, stage: StageConfig, data: DataConfig, auto_class: str, where: str) -> dict[str, CacheFacts]:
        """What is known of the caches that a stage reads, by teacher; those of earlier stages need not exist yet."""
        found = {}
        for i, teacher in enumerate(stage.teachers):
            if BACKENDS[teacher.backend].runs:
                continue
            place, made = f"{where}.teachers[{i}].model", teacher.model.stage
            if made is None:
                found[teacher.name] = read_facts(teacher.model.path or "", self.config.base, auto_class, place)
                check_precision_of(found[teacher.name], self.config.engine.decided_precision, place)
                if not self.models.stands_in:
                    check_tokenizer_of(found[teacher.name], self.models.tokenizer, place)
            else:
                found[teacher.name] = self._cached[made.model]
                earlier = self.config.stages[made.stage]
                check_same_data(self.config, earlier, stage, place)
            facts = found[teacher.name]
            found[teacher.name] = replace(facts, info=with_open_labels(facts.info, self.models.facts(data), auto_class))
        return found

    def look(self) -> Look:
        """What the ladder of a chain asks about models."""
        return Look(self.stage, self.models.unread, self.models.made)

    def _state(self, name: str) -> str:
        folder = self.config.folder
        if name in self._to_do or not (folder / "run.yaml").is_file():
            return "to do"
        stage = RunDir.open(folder).stage(list(self.config.stages).index(name) + 1, name)
        record = stage.done()
        if record is None:
            return "to do"
        same = record["identity"].get("stage") == stage_values(self.config.stages[name])
        return SKIPPED if same else "done, but differs"

    def _tokens(self, stage: StageConfig, max_length: int) -> int | None:
        return None if stage.steps is None else stage.steps * _per_step(stage, max_length)

    def _sizes(self, stage: StageConfig, models: list[PlannedModel], where: str) -> list[TeacherSize]:
        """What the teachers occupy; refuses those that there is no room for."""
        sizes = [
            BACKENDS[teacher.backend].size(teacher, model.weight_bytes, model.head_bytes, model.layers)
            for teacher, model in zip(stage.teachers, models, strict=True)
        ]
        check_room(sizes, Place(self._on_gpu), self.config.folder, f"{where}.teachers")
        return sizes

    @property
    def _on_gpu(self) -> bool:
        device = self.config.engine.device
        return device == "cuda" or (device == "auto" and torch.cuda.is_available())

    def with_memory(self, stages: list[PlannedStage]) -> list[PlannedStage]:
        """The stages with what each needs of memory and disk."""
        engine = self.config.engine
        # who says how large a GPU is plans for it, and may do so where there is none
        on_gpu = self._on_gpu or (engine.device == "auto" and engine.gpu_memory_gb is not None)
        limits = find_limits(engine, self.config.folder, on_gpu=on_gpu)
        return [
            replace(stage, memory=stage_memory(self._sketches[stage.name], engine, limits, on_gpu=on_gpu))
            for stage in stages
        ]


def _regression(task: TaskSpec, facts: DataFacts) -> bool | None:
    """Whether labels are numbers; None while nobody has read the data."""
    if task.token_level:
        return False
    return facts.kind == "number" if facts.known else None


def _check_packed(task: TaskSpec, models: list[PlannedModel], infos: list[ModelInfo], where: str) -> None:
    """Refuse to pack examples, or for models, that cannot share a row."""
    if task.laid:
        raise UserError(
            f"examples of task '{task.name}' have two parts, each with a mask of its own",
            where=where,
            found="packing",
            todo="drop packing",
        )
    for model, info in zip(models, infos, strict=True):
        if not model.backend or BACKENDS[model.backend].runs:
            check_packing(info, where)


def _per_step(stage: StageConfig, max_length: int) -> int:
    """Tokens of a batch, at most."""
    return stage.batch.tokens or (stage.batch.sequences or 0) * max_length
