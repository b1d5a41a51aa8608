"""Describe a stage: its models, data, teachers, objective and length."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mtkd.config.base import (
    Config,
    Decay,
    Epochs,
    Length,
    Name,
    Named,
    Natural,
    NotNegative,
    Positive,
    Rate,
    Seed,
    Share,
)
from mtkd.config.cache import CacheConfig
from mtkd.config.generate import GenerateConfig
from mtkd.config.match import Match
from mtkd.config.model import ModelConfig
from mtkd.config.rollout import RolloutConfig
from mtkd.config.teacher import ModelTeacher, TeacherConfig

# Fields that a cache stage reads.
_OF_CACHES = {"kind", "data", "teachers", "batch", "cache"}
_OF_TEXTS = {"kind", "data", "teachers", "batch", "write", "seed"}


class ScoringBatchConfig(Config):
    """The number of examples that run together, over all ranks and micro-batches."""

    sequences: Length | None = Field(None, description="sequences per optimizer step")
    tokens: Positive | None = Field(
        None,
        description="token budget per optimizer step: padding included, batches grouped by length; with packing: "
        "without padding, in random order",
    )
    accumulate: Length = Field(1, description="micro-batches per rank and optimizer step")

    @model_validator(mode="after")
    def _one_size(self) -> ScoringBatchConfig:
        if (self.sequences is None) == (self.tokens is None):
            raise ValueError("give either `sequences` or `tokens`")
        return self


class BatchConfig(ScoringBatchConfig):
    """The examples of one optimizer step (of a cache: one forward), and how they share rows."""

    packing: bool = Field(
        False,
        description="causal-lm: examples share rows without padding, each with its own positions and attention; "
        "student and teachers. Same losses, other dropout",
    )
    group_by_length: bool = Field(
        False,
        description="with sequences: examples of like length meet (sorted within shuffled groups of 50 steps), which "
        "saves padding; `tokens` does it anyway",
    )

    @model_validator(mode="after")
    def _grouped_once(self) -> BatchConfig:
        if self.group_by_length and self.tokens is not None:
            raise ValueError("group_by_length goes with `sequences`; `tokens` groups by itself, unless packing")
        if self.group_by_length and self.packing:
            raise ValueError("packing leaves no padding to save; drop group_by_length")
        return self


class OptimizerConfig(Config):
    """AdamW and its schedule; they go to DeepSpeed in full, since its defaults differ."""

    lr: Rate = Field(5e-4, description="peak learning rate")
    weight_decay: NotNegative = Field(0.01, description="decoupled; matrices only, not biases and norms")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="Adam's decay rates")
    eps: Annotated[float, Field(ge=1e-30, le=1)] = Field(1e-8, description="Adam's epsilon")
    warmup: Share = Field(0.1, description="share of the steps with linearly rising learning rate")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="after warm-up; linear and cosine end at final_lr"
    )
    final_lr: Share = Field(0.0, description="learning rate at the end, as a share of the peak")
    clip: NotNegative = Field(1.0, description="largest norm of the whole gradient; 0 = no clipping")


class EqualTime(Config):
    """Train as many seconds as another stage."""

    to: Name = Field(description="stage whose training seconds are matched")
    rate_of: Name = Field(description="stage with the same work per step, whose measured seconds per step are used")


class EarlyStop(Config):
    """End a stage whose validation score no longer improves."""

    metric: str = Field(
        "loss", description="validation metric: loss (nats per target), or one of the task's, e.g. accuracy"
    )
    patience: Positive = Field(3, description="evaluations in a row without a new best score after which it ends")


class StageConfig(Config):
    """One stage of a run; later stages use its model as stage:NAME, or one of several as stage:NAME/MEMBER."""

    kind: Literal["finetune", "cofinetune", "distill", "cache", "generate"] = Field(
        description="finetune: labels only; cofinetune: several models on labels that share their pooling and "
        "prediction layers; distill: from teachers; cache: the teachers' outputs on the train split, for later stages; "
        "generate: texts that the teachers write to the train split's prompts, for later stages"
    )
    data: str = Field("", description="name of a `data` entry; may be left out when there is only one")
    student: ModelConfig | None = Field(None, description="the model that is trained (finetune, distill)")
    members: dict[Name, ModelConfig] = Field(
        default_factory=dict, description="cofinetune: the models trained together, by name; used as stage:NAME/MEMBER"
    )
    teachers: tuple[TeacherConfig, ...] = Field(
        (), description="the pool, in order; of a cache stage those that are run, used as stage:NAME/TEACHER"
    )
    cache: CacheConfig = Field(CacheConfig(), description="cache: what is kept of the teachers")
    write: GenerateConfig | None = Field(None, description="generate: how texts are written, and which are kept")
    method: Named | None = Field(None, description="a method of the table; its rows come first")
    match: tuple[Match, ...] = Field((), description="further rows, or with `replace` in place of the method's")
    weighting: Named = Field(
        Named(name="uniform"),
        description="how much each teacher counts; default: uniform; of causal-lm per token: posterior",
    )
    per: Literal["example", "token"] = Field("example", description="one weight per example or per token (token tasks)")
    steps: Positive | None = Field(None, description="optimizer steps")
    epochs: Epochs | None = Field(None, description="passes over the train split")
    equal_time: EqualTime | None = Field(None, description="instead of steps: train as long as another stage")
    rollout: RolloutConfig | None = Field(
        None, description="distill, causal-lm with prompts: the student writes answers, the teachers score them"
    )
    transforms: tuple[Named, ...] = Field(
        (), description="what plug-ins do to the batches of a step before they are read, in order: @mtkd.transform"
    )
    batch: BatchConfig = Field(BatchConfig(sequences=16), description="batch size")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="optimizer and schedule")
    seed: Seed | None = Field(None, description="of initialisation, order and dropout; default: the run's seed")
    evaluate_every: Natural = Field(0, description="optimizer steps between validation losses; 0 = only at the end")
    save_every: Natural = Field(0, description="optimizer steps between checkpoints; 0 = only at the end")
    keep: Positive = Field(2, description="newest sealed checkpoints kept")
    early_stop: EarlyStop | None = Field(
        None, description="end before the last step when the validation score stays; counts `evaluate_every` steps"
    )
    export: Literal["last", "best"] = Field(
        "last", description="which step becomes the stage's model: the last, or that of the best validation score"
    )
    export_metric: str = Field(
        "", description="export: best: validation metric as in early_stop.metric; default: that one, else loss"
    )

    @property
    def selects(self) -> str:
        """The validation metric that ends the stage or chooses its step; "" for none."""
        if self.early_stop is not None:
            return self.early_stop.metric
        return (self.export_metric or "loss") if self.export == "best" else ""

    @field_validator("teachers")
    @classmethod
    def _unique_teachers(cls, teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
        names = [t.name for t in teachers]
        double = sorted({n for n in names if names.count(n) > 1})
        if double:
            raise ValueError(f"teacher name {double[0]!r} is used twice; give each its own `name`")
        return teachers

    @model_validator(mode="after")
    def _consistent(self) -> StageConfig:
        if self.kind == "cache":
            self._check_cache()
            return self
        if self.kind == "generate":
            self._check_generate()
            return self
        if self.write is not None:
            raise ValueError("write is for kind: generate; a distill stage whose student writes has rollout")
        if "cache" in self.model_fields_set:
            raise ValueError("cache is for kind: cache; a stage that reads one has teachers with backend: cached")
        if sum(x is not None for x in (self.steps, self.epochs, self.equal_time)) != 1:
            raise ValueError("give exactly one of `steps`, `epochs`, `equal_time`")
        if self.kind == "cofinetune":
            if self.student is not None:
                raise ValueError("a cofinetune stage trains its `members`; drop student")
            if len(self.members) < 2:
                raise ValueError("a cofinetune stage needs at least two `members`; one alone is kind: finetune")
        elif self.student is None or self.members:
            raise ValueError(f"a {self.kind} stage trains one model: give `student`, and no `members`")
        self._check_selection()
        if self.kind == "distill":
            if not self.teachers:
                raise ValueError("a distill stage needs `teachers`")
            if self.method is None and not self.match:
                raise ValueError("a distill stage needs a `method` or `match` rows")
        else:
            unread = [n for n in ("teachers", "method", "match", "rollout") if getattr(self, n)]
            if unread or "weighting" in self.model_fields_set:
                raise ValueError(
                    f"a {self.kind} stage trains on labels alone; drop {', '.join(unread or ['weighting'])}"
                )
        return self

    def _check_cache(self) -> None:
        """Refuse fields that a cache stage does not read, and teachers that it cannot run."""
        unread = sorted(self.model_fields_set - _OF_CACHES)
        if unread:
            raise ValueError(
                "a cache stage trains nothing, it runs its teachers once over the train split; drop "
                + ", ".join(unread)
            )
        if not self.teachers:
            raise ValueError("a cache stage needs `teachers`")
        if more := sorted(self.batch.model_fields_set - {"sequences", "tokens"}):
            raise ValueError(f"batch.{more[0]}: a cache stage has no optimizer steps; its batch is sequences or tokens")
        for teacher in self.teachers:
            if teacher.domains:
                raise ValueError(
                    f"teacher {teacher.name!r} has a domain: a cache stage asks it about every text; "
                    "give `domain` where the cache is read"
                )
            if teacher.no_cache:
                raise ValueError(f"teacher {teacher.name!r}{teacher.no_cache}")

    def _check_generate(self) -> None:
        """Refuse fields that a generate stage does not read, and teachers that cannot write or score."""
        unread = sorted(self.model_fields_set - _OF_TEXTS)
        if unread:
            raise ValueError(f"a generate stage trains nothing, its teachers write; drop {', '.join(unread)}")
        if not self.teachers or self.write is None:
            raise ValueError("a generate stage needs `teachers`, and `write`: how they write")
        if more := sorted(self.batch.model_fields_set - {"sequences"}):
            raise ValueError(f"batch.{more[0]}: of a generate stage only sequences is read: texts at one time")
        for teacher in self.teachers:
            if not isinstance(teacher, ModelTeacher):
                raise ValueError(f"teacher {teacher.name!r} is no model that is here: it cannot write or score texts")
            if teacher.domains or teacher.calibrate is not None:
                raise ValueError(f"teacher {teacher.name!r}: domain and calibrate are not read by a generate stage")
        names = [teacher.name for teacher in self.teachers]
        if unknown := [name for name in self.write.writers if name not in names]:
            raise ValueError(f"write.writers: {unknown[0]!r} is no teacher of the stage: {', '.join(names)}")
        if self.write.keep.by == "agreement" and len(names) < 2:
            raise ValueError("write.keep.by: agreement is that of other teachers than the writer: name a second one")

    @property
    def parts(self) -> tuple[str, ...]:
        """Names for stage:NAME/PART: the members, or a cache stage's teachers; () for one model."""
        return tuple(t.name for t in self.teachers) if self.kind == "cache" else tuple(self.members)

    @property
    def trained(self) -> dict[str, ModelConfig]:
        """The models that the stage trains, by name: "student", or the members."""
        return dict(self.members) if self.student is None else {"student": self.student}

    def place(self, name: str, role: str) -> str:
        """The place of the model that the stage `name` trains under `role`."""
        return f"stages.{name}.{role}" if self.student is not None else f"stages.{name}.members.{role}"

    def _check_selection(self) -> None:
        if self.export_metric and self.export != "best":
            raise ValueError("export_metric goes with export: best")
        if self.early_stop and self.export_metric and self.export_metric != self.early_stop.metric:
            raise ValueError("one metric decides: export_metric and early_stop.metric differ")
        if self.selects and not self.evaluate_every:
            raise ValueError("early_stop and export: best need evaluate_every: without it nothing is scored on the way")
