"""Turn the configuration of a stage into its `StageSpec`, and refuse errors that show without weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mtkd.config import RunConfig, StageConfig, TeacherConfig
from mtkd.data.tasks import TaskSpec
from mtkd.engine.precision import device_of
from mtkd.errors import UserError
from mtkd.methods.rows import placed_rows
from mtkd.models.info import check_packing
from mtkd.objective.cofinetune import check_members
from mtkd.objective.compile import Row, compile_rows
from mtkd.planning.caches import (
    bytes_per_token,
    check_cacheable,
    check_cached,
    check_layers,
    compressed_from_cache,
    content_of,
    describe,
    train_tokens,
)
from mtkd.planning.calibrated import check_calibrated, fitted_on_scored
from mtkd.planning.data import DataReader
from mtkd.planning.defaults import chosen_for
from mtkd.planning.generate import with_texts
from mtkd.planning.ladder import Look
from mtkd.planning.models import PlannedModels
from mtkd.planning.rollouts import check_can_write
from mtkd.planning.spec import DataSpec, ModelSpec, StageSpec, TeacherSpec
from mtkd.planning.specialists import check_specialists, unknown_classes
from mtkd.planning.stages import model_name, never_trained, stage_seed
from mtkd.planning.teachers import TeacherOutlook, check_predictions
from mtkd.planning.teaching import heads_read
from mtkd.pool import BACKENDS
from mtkd.pool.backends import check_room
from mtkd.pool.cache.folder import CacheFacts
from mtkd.pool.sizes import Place
from mtkd.registry import TASKS
from mtkd.weightings.make import stage_reads


class Specifier:
    """Makes the specs of a run's stages, in order.

    Args:
        config: resolved.
        reader: of the data entries; None: the configuration alone gives classes.
    """

    def __init__(self, config: RunConfig, reader: DataReader | None = None) -> None:
        self.config = config
        self.models = PlannedModels(config, reader)
        self._caches: dict[str, CacheFacts] = {}  # NAME/TEACHER -> facts of the cache that an earlier stage makes

    def look(self) -> Look:
        """The models of the run, for the ladder of a chain."""
        return Look(self.stage, self.models.unread, self.models.made)

    def stage(self, name: str) -> StageSpec:
        """The spec of a stage.

        Raises:
            UserError: the stage would fail later for a reason that can be known now.
        """
        stage = self.config.stages[name]
        spec = StageSpec(
            name=name,
            stage=stage,
            data=self._data(stage),
            trained={},
            teachers=(),
            seed=stage_seed(self.config, stage),
            heads=heads_read(self.config, name),
        )
        if stage.kind == "cache":
            check_cacheable(stage, spec.data.config, spec.where)
        spec = replace(spec, trained=self._trained(spec))
        spec = replace(spec, teachers=tuple(self._teacher(spec, i, t) for i, t in enumerate(stage.teachers)))
        check_predictions(spec)
        check_calibrated(self.config, spec, self.models.facts)
        kinds = {"cache": self._with_caches, "generate": with_texts}
        spec = kinds.get(stage.kind, self._with_rows)(spec)
        sizes, place = [teacher.size for teacher in spec.teachers], Place(device_of(self.config.engine) == "cuda")
        check_room(sizes, place, self.config.folder, f"{spec.where}.teachers")
        return replace(spec, notes=(*self._notes(name), *unknown_classes(spec), *fitted_on_scored(self.config, spec)))

    def _data(self, stage: StageConfig) -> DataSpec:
        name = self.config.data_name(stage.data)
        data = self.config.data[name]
        return DataSpec(name, data, TASKS.find(data.task, f"data.{name}.task"), self.models.facts(data))

    def _trained(self, spec: StageSpec) -> dict[str, ModelSpec]:
        """Specify the models that the stage trains, and note them for later stages."""
        stage, models = spec.stage, self.models
        configs = {role: models.of(stage, model, stage.place(spec.name, role)) for role, model in stage.trained.items()}
        models.made |= {model_name(spec.name, stage, role): config for role, config in configs.items()}
        trained = {}
        for role, model in stage.trained.items():
            name = model_name(spec.name, stage, role)
            if model.vocabulary is not None or models.vocabulary(model) is not None:
                models.compressed[name] = configs[role].vocab_size
            models.check_tokenizer(model, stage.place(spec.name, role), spec.data.task, teaches=False)
            trained[role] = models.spec(configs[role], model, spec.data, compressed=name in models.compressed)
        return trained

    def _teacher(self, spec: StageSpec, number: int, teacher: TeacherConfig) -> TeacherSpec:
        place = f"{spec.where}.teachers[{number}]"
        outlook = TeacherOutlook(self.config, self.models, spec, teacher, place, self._caches)
        return TeacherSpec(teacher, place, BACKENDS[teacher.backend].describe(teacher, outlook), teacher.backend)

    def _with_rows(self, spec: StageSpec) -> StageSpec:
        """The stage with its rows, checked against its models."""
        if spec.stage.batch.packing:
            live = [t.gives for t in spec.teachers if isinstance(t.gives, ModelSpec)]
            _check_packed(spec.data.task, [*spec.trained.values(), *live], f"{spec.where}.batch.packing")
        if spec.stage.rollout is not None and spec.stage.rollout.share:
            check_can_write(spec.trained["student"], f"{spec.where}.rollout")
        if spec.stage.members:
            check_members({role: model.info for role, model in spec.trained.items()}, f"{spec.where}.members")
        rows = self._rows(spec)
        caches = {t.name: t.gives for t in spec.teachers if isinstance(t.gives, CacheFacts)}
        check_cached(spec.stage, rows, caches, token_level=spec.token_level, where=spec.where)
        check_specialists(spec, rows)
        if caches and spec.token_level and spec.name in self.models.compressed:
            raise compressed_from_cache(next(iter(caches)), f"{spec.where}.student.vocabulary")
        if spec.token_level and spec.name in self.models.compressed:
            _check_whole_text(spec)
        return replace(spec, rows=tuple(rows))

    def _rows(self, spec: StageSpec) -> Sequence[Row]:
        data, first = spec.data, next(iter(spec.trained.values()))
        return compile_rows(
            placed_rows(spec.stage, data.config, spec.where, data.facts.kind == "number"),
            first.info,
            {t.name: t.info for t in spec.teachers},
            token_level=spec.token_level,
            regression=data.regression,
        )

    def _with_caches(self, spec: StageSpec) -> StageSpec:
        """The stage with the contents of its caches, noted for later stages."""
        size, lines, tokens = 0.0, list[str](), train_tokens(spec.data.config, self.config.base)
        for teacher in spec.teachers:
            content = content_of(
                spec.stage.cache,
                token_level=spec.token_level,
                columns=self.models.tokens.num_ids if spec.token_level else teacher.info.num_labels,
                seed=self.config.seed,
                others=teacher.num_others,
                missing=teacher.missing,
            )
            check_layers(content, teacher.info, f"{spec.where}.cache", teacher.name)
            name = f"{spec.name}/{teacher.name}"
            if isinstance(teacher.gives, ModelSpec):
                self.models.made[name] = teacher.gives.config
            self._caches[name] = CacheFacts(
                content,
                teacher.info,
                teacher.numbers.parameters,
                spec.where,
                calibrated=teacher.config.calibrate is not None,
            )
            size += bytes_per_token(content, teacher.info)
            remark = BACKENDS[teacher.backend].remark(spec.tokens_per_batch)
            text = f"{teacher.name}: {describe(content, teacher.info, tokens)}"
            lines.append("; ".join(filter(None, (text, remark))))
        return replace(spec, cached=tuple(lines), cache_bytes=None if tokens is None else size * tokens)

    def _notes(self, name: str) -> tuple[str, ...]:
        """Decisions about a stage's models, a sentence each."""
        prefix = f"stages.{name}."
        places = {place: notes for place, notes in self.models.notes.items() if place.startswith(prefix)}
        lines = [f"{place}: {note}" for place, notes in places.items() for note in notes]
        if self.config.stages[name].kind == "distill" and never_trained(self.config, name):
            lines.append("no row compares logits: the model never learns to predict here, and is not scored")
        if chosen_for(self.config.stages[name]):
            lines.append("weighting: posterior, as there is a weight per token and none is named; uniform is the other")
        return tuple(lines)


def _check_whole_text(spec: StageSpec) -> None:
    """Refuse a weighting that reads the text where teachers are read at the student's ids alone."""
    if stage_reads(spec.stage, spec.where, token_level=True).text:
        raise UserError(
            f"weighting '{spec.stage.weighting.name}' reads how probable the teachers hold every token, and the "
            "student keeps a part of the ids",
            where=f"{spec.where}.weighting",
            found=spec.stage.weighting.name,
            todo="give the student the whole vocabulary, or choose a weighting that reads something else",
        )


def _check_packed(task: TaskSpec, models: Sequence[ModelSpec], where: str) -> None:
    """Refuse packing where the examples of a task, or a model, cannot share rows."""
    if task.laid:
        raise UserError(
            f"examples of task '{task.name}' have two parts, each with a mask of its own",
            where=where,
            found="packing",
            todo="drop packing",
        )
    for model in models:
        check_packing(model.info, where)
