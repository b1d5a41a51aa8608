"""Describe a stage without weights: the plan makes the `StageSpec` once, and every later part reads it.

The plan's table, the count of memory, the build and the capture of caches share one `StageSpec`. Nothing in it depends
on the machine: the size of a tile, the number of processes and the state of the run are asked elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from mtkd.config import DataConfig, StageConfig, TeacherConfig
from mtkd.data.tasks import TaskSpec
from mtkd.models.classes import ClassMap
from mtkd.models.info import CLASSIFIER, ModelInfo, model_info
from mtkd.models.numbers import Numbers, numbers_of
from mtkd.objective.compile import Row
from mtkd.planning.data import DataFacts
from mtkd.planning.stages import needed_stages
from mtkd.pool import BACKENDS, Gives
from mtkd.pool.cache.folder import CacheFacts
from mtkd.pool.sizes import TeacherSize


@dataclass(frozen=True)
class DataSpec:
    """The data of a stage.

    Attributes:
        name: of the `data` entry.
        facts: from its rows: classes, kind of label.
    """

    name: str
    config: DataConfig
    task: TaskSpec
    facts: DataFacts

    @property
    def auto_class(self) -> str:
        """The class of transformers that has the head for these data."""
        return self.task.class_for(self.config)

    @property
    def regression(self) -> bool | None:
        """Whether labels are numbers; None while the data is not read."""
        if self.task.token_level:
            return False
        return self.facts.kind == "number" if self.facts.known else None


@dataclass(frozen=True)
class ModelSpec:
    """A model without weights.

    Attributes:
        config: transformers' configuration, as the stage will load it.
        auto_class: its head.
        num_ids: real ids of the run; an upper bound while the run has to train its tokenizer.
        kept: rows of a compressed vocabulary; None for a whole one.
        labels_known: False while only the data can tell the number of classes.
        classes: of a teacher: which of its outputs are the data's classes; None while a side is not known.
    """

    config: PretrainedConfig
    auto_class: str
    num_ids: int
    kept: int | None = None
    dtype: torch.dtype = torch.float32
    labels_known: bool = True
    classes: ClassMap | None = None

    @cached_property
    def info(self) -> ModelInfo:
        """Shape and capabilities; a classifier with unknown classes has two."""
        info = model_info(self.config, self.auto_class)
        return with_open_labels(info, self.auto_class, known=self.labels_known)

    @cached_property
    def numbers(self) -> Numbers:
        """Its size in its number format; counted without memory for it."""
        return numbers_of(self.config, self.auto_class)

    @property
    def num_parameters(self) -> int:
        """Number of parameters, tied ones once."""
        return self.numbers.parameters


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher of a stage.

    Attributes:
        config: its block in the configuration.
        place: of that block in the user's file.
        gives: the model that runs, the cache that replaces it, or a plug-in's facts about its own teacher.
        backend: where its weights live; the configured one, unless the plan tries another.
    """

    config: TeacherConfig
    place: str
    gives: Gives
    backend: str

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def info(self) -> ModelInfo:
        return self.gives.info

    @property
    def numbers(self) -> Numbers:
        """The size of its model; one that does not run takes no memory."""
        return self.gives.numbers

    @property
    def num_others(self) -> int:
        """Number of its outputs that mean "none of my classes"."""
        return self.gives.content.others if isinstance(self.gives, CacheFacts) else len(self.config.others)

    @property
    def missing(self) -> tuple[str, ...]:
        """Classes of the data that it has no output for, as far as they are known."""
        if isinstance(self.gives, CacheFacts):
            return self.gives.content.missing
        classes = self.gives.classes if isinstance(self.gives, ModelSpec) else None
        return () if classes is None else classes.missing

    @property
    def size(self) -> TeacherSize:
        """The memory of its weights under its backend."""
        numbers, backend = self.numbers, BACKENDS[self.config.backend]
        size = backend.size(self.config, numbers.weights, numbers.head, self.info.num_layers)
        return replace(size, backend=self.backend)


@dataclass(frozen=True)
class StageSpec:
    """One stage of a run.

    Attributes:
        stage: its configuration.
        trained: the models it trains, by role: "student", or the members.
        teachers: in pool order.
        rows: of its objective, compiled against student and teachers; none for a cache.
        heads: the teachers' heads that are read (`mtkd.planning.teaching`) and so must be trained.
        seed: of initialisation, order and dropout.
        cached: contents of the caches it makes, a line per teacher.
        cache_bytes: upper bound of the bytes of these caches; None: unknown.
        notes: decisions made for the user, a sentence each.
    """

    name: str
    stage: StageConfig
    data: DataSpec
    trained: Mapping[str, ModelSpec]
    teachers: tuple[TeacherSpec, ...]
    seed: int
    heads: frozenset[str] = frozenset()
    rows: tuple[Row, ...] = ()
    cached: tuple[str, ...] = ()
    cache_bytes: float | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def where(self) -> str:
        """Its place in the user's file."""
        return f"stages.{self.name}"

    @property
    def needs(self) -> list[str]:
        """The earlier stages that it cannot be made without."""
        return needed_stages(self.stage, self.data.config)

    @property
    def token_level(self) -> bool:
        """Whether targets are tokens."""
        return self.data.task.token_level

    @property
    def exported(self) -> int:
        """Bytes of the models that it exports."""
        return sum(model.numbers.weights for model in self.trained.values())

    @property
    def columns(self) -> int:
        """Columns of the widest logits: rows of a head, or the real ids where a cache keeps some of them."""
        if self.token_level and not self.stage.trained:
            return max(t.gives.num_ids if isinstance(t.gives, ModelSpec) else t.info.vocabulary for t in self.teachers)
        infos = [*(model.info for model in self.trained.values()), *(teacher.info for teacher in self.teachers)]
        return max(info.vocabulary if self.token_level else info.num_labels for info in infos)

    @property
    def tokens_per_batch(self) -> int:
        """Upper bound of the tokens of a batch."""
        batch = self.stage.batch
        return batch.tokens or (batch.sequences or 0) * self.data.config.max_length

    def with_backend(self, name: str) -> StageSpec:
        """The stage with another backend for every teacher that would take less memory there."""
        teachers = (replace(t, backend=name) if name in BACKENDS[t.backend].lighter else t for t in self.teachers)
        return replace(self, teachers=tuple(teachers))


def with_open_labels(info: ModelInfo, auto_class: str, *, known: bool) -> ModelInfo:
    """Two classes for every classifier while the data is not read; the build compares the real numbers."""
    return replace(info, num_labels=2) if auto_class == CLASSIFIER and not known else info
