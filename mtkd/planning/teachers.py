"""Check that the backends of a run's teachers are registered, and give each backend its view of the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mtkd.config import RunConfig, TeacherConfig
from mtkd.data.batch import STUDENT
from mtkd.errors import UserError
from mtkd.models.classes import Meaning
from mtkd.models.folder import check_folder, find_folder
from mtkd.models.formats import format_of
from mtkd.models.info import CLASSIFIER
from mtkd.models.weights import check_weights
from mtkd.planning.caches import check_same_data
from mtkd.planning.locate import missing, resolve_path
from mtkd.planning.models import PlannedModels
from mtkd.planning.places import placed
from mtkd.planning.spec import ModelSpec, StageSpec, with_open_labels
from mtkd.pool import BACKENDS, Asked
from mtkd.pool.cache.folder import CacheFacts, check_precision_of, check_tokenizer_of, read_facts


def check_backends(config: RunConfig) -> None:
    """Refuse a teacher whose backend is not registered.

    Raises:
        UserError: with the nearest known name.
    """
    for place, teacher in _teachers(config).items():
        BACKENDS.find(teacher.backend, f"{place}.backend")


def check_teachers(config: RunConfig) -> None:
    """Refuse unknown backends and options of teachers, and backends that this machine cannot run.

    Raises:
        UserError: naming the teacher.
    """
    for place, teacher in _teachers(config).items():
        BACKENDS.find(teacher.backend, f"{place}.backend").check(teacher, place)
    for name, stage in config.stages.items():
        for i, teacher in enumerate(stage.teachers):
            _check_view(config, name, teacher, f"stages.{name}.teachers[{i}]")


def _teachers(config: RunConfig) -> dict[str, TeacherConfig]:
    """Every teacher of a run, by its place."""
    places = {f"stages.{name}.teachers": stage.teachers for name, stage in config.stages.items()}
    if config.chain is not None:
        places["chain.teachers"] = config.chain.teachers
    return {f"{place}[{i}]": teacher for place, teachers in places.items() for i, teacher in enumerate(teachers)}


def check_predictions(spec: StageSpec) -> None:
    """Refuse a teacher without logits in a stage whose rows, weighting, cache or ensemble reads them.

    Raises:
        UserError: naming the teacher.
    """
    for teacher in spec.teachers:
        if "logits" in spec.heads and "logits" not in teacher.info.taps:
            raise UserError(
                f"teacher '{teacher.name}' gives no logits, and a row, the weighting, the cache or the score of the "
                "ensemble reads them",
                where=teacher.place,
                found=f"it gives {', '.join(sorted(teacher.info.taps))}",
                todo="take another teacher, or compare its hidden states alone",
            )


def _check_view(config: RunConfig, name: str, teacher: TeacherConfig, place: str) -> None:
    """Refuse a teacher that reads a view where no transform can have written it."""
    view, stage = BACKENDS[teacher.backend].view_of(teacher), config.stages[name]
    if view == STUDENT:
        return
    if not stage.transforms:
        raise UserError(
            f"teacher '{teacher.name}' reads the view '{view}', which only a transform of the stage can add",
            where=place,
            found=f"a {stage.kind} stage without transforms",
            todo=f"name a transform that adds '{view}' under stages.{name}.transforms of a stage that trains",
        )
    if name in config.evaluate.ensembles:
        raise UserError(
            f"teacher '{teacher.name}' reads the view '{view}', which the batches of a score do not have",
            where="evaluate.ensembles",
            found=name,
            todo="leave the stage out here",
        )


@dataclass(frozen=True)
class TeacherOutlook:
    """The plan's knowledge for one teacher; an `Outlook` of `mtkd.pool.backend`.

    Attributes:
        spec: of its stage, without teachers and rows.
        place: of the teacher.
        caches: facts of the caches that earlier stages make, by name.
    """

    config: RunConfig
    models: PlannedModels
    spec: StageSpec
    teacher: TeacherConfig
    place: str
    caches: Mapping[str, CacheFacts]

    @property
    def asked(self) -> Asked:
        data, facts = self.spec.data, self.spec.data.facts
        classes = facts.num_labels if facts.known else 2
        columns = self.models.tokens.num_ids if data.task.token_level else classes
        return Asked(data.auto_class, data.task.token_level, columns, facts.classes, data.config.max_length)

    def model(self) -> ModelSpec:
        teacher, data, place, backend = self.teacher, self.spec.data, self.place, BACKENDS[self.teacher.backend]
        config = self.models.of(self.spec.stage, teacher.model, place, self.spec.heads, Meaning.of(teacher))
        name = format_of(config)
        if name is not None and not backend.formats:
            raise UserError(
                f"backend '{teacher.backend}' does not keep weights of number format '{name}'",
                where=f"{place}.backend",
                todo="use another backend, or the full weights",
            )
        folder = resolve_path(teacher.model.path or "", self.config.base)
        if backend.in_files and isinstance(folder, Path) and data.auto_class != CLASSIFIER:
            with placed(model=f"{place}.model"):
                check_folder(folder)
                check_weights(config, data.auto_class, folder)
        self.models.check_tokenizer(teacher.model, place, data.task, teaches=True)
        return replace(self.models.spec(config, teacher.model, data), classes=self.models.matched.get(place))

    def find_model(self) -> None:
        model, base = self.teacher.model, self.config.base
        if model.path is None or model.stage is not None or missing(model.path, base) is not None:
            return  # an earlier stage makes it, or the plan lists it as missing
        with placed(model=f"{self.place}.model", teacher=self.place):
            find_folder(model.path, model.revision, lambda path: resolve_path(path, base), weights=False)

    def cache(self) -> CacheFacts:
        ref, data, where = self.teacher.model.stage, self.spec.data, f"{self.place}.model"
        if ref is None:
            facts = read_facts(self.teacher.model.path or "", self.config.base, data.auto_class, where)
            check_precision_of(facts, self.config.engine.decided_precision, where)
            if not self.models.tokens.stands_in:
                check_tokenizer_of(facts, self.models.tokens.tokenizer, where)
        else:
            facts = self.caches[ref.model]
            check_same_data(self.config, self.config.stages[ref.stage], self.spec.stage, where)
        if self.teacher.calibrate is not None:  # of k columns: stored traits are those of the teacher as it was
            facts = replace(facts, content=replace(facts.content, ce=False, scalars=()))
        return replace(facts, info=with_open_labels(facts.info, data.auto_class, known=data.facts.known))
