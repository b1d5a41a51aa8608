"""Expand teacher-assistant chains: `chain` of a run file becomes plain stages.

Once every shape is known, the expansion depends on this configuration alone, so that run, plan, resume and status see
the same stages. `mtkd.planning.plan.resolve` first derives shapes that depend on other models (`num_rungs`, `initial:
teacher | slice`) and writes them into `models`. The run folder's copy of the configuration keeps models and stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from mtkd.config.base import (
    Config,
    Epochs,
    Layers,
    Name,
    Named,
    Natural,
    Positive,
    Seed,
    Share,
    Temperature,
    Width,
)
from mtkd.config.match import Match
from mtkd.config.model import ModelConfig
from mtkd.config.refs import StageRef
from mtkd.config.stage import BatchConfig, EarlyStop, OptimizerConfig, StageConfig
from mtkd.config.teacher import OwnTeacher, TeacherConfig, teacher_config

Initial = Literal["fresh", "teacher", "slice"]

# Training settings that the direct student may override: equal other settings make it the control.
_OF_DIRECT = {"method", "match", "weighting", "per"}
# Lengths of training: an override of one replaces the other.
_LENGTHS = ("steps", "epochs")


class Training(Config):
    """Training settings of all stages of a chain, or of one stage in `overrides`."""

    data: str | None = Field(None, description="name of a `data` entry; may be left out when there is only one")
    initial: Initial | None = Field(
        None,
        description="start of a model: fresh (default) = random; teacher = evenly chosen layers of the model above it, "
        "of equal architecture, width and heads; slice = such layers, cut to the width and heads of the model",
    )
    method: Named | None = Field(None, description="a method of the table; default: kd by lam and temperature")
    match: tuple[Match, ...] | None = Field(
        None, description="further rows; without `method` the only ones, instead of the default method's"
    )
    weighting: Named | None = Field(None, description="how much each teacher counts; default: uniform, dgkd: drop")
    per: Literal["example", "token"] | None = Field(None, description="one weight per example or per token")
    steps: Positive | None = Field(None, description="optimizer steps")
    epochs: Epochs | None = Field(None, description="passes over the train split")
    batch: BatchConfig | None = Field(None, description="batch size")
    optimizer: OptimizerConfig | None = Field(
        None, description="optimizer and schedule; an override changes the keys it names"
    )
    seed: Seed | None = Field(None, description="of initialisation, order and dropout; default: the run's seed")
    evaluate_every: Natural | None = Field(
        None, description="optimizer steps between validation losses; 0 = only at the end"
    )
    save_every: Natural | None = Field(None, description="optimizer steps between checkpoints; 0 = only at the end")
    keep: Positive | None = Field(None, description="newest sealed checkpoints kept")
    early_stop: EarlyStop | None = Field(None, description="end a stage when its validation score stays")
    export: Literal["last", "best"] | None = Field(None, description="which step becomes the stage's model")
    export_metric: str | None = Field(None, description="validation metric of export: best")

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give either `steps` or `epochs`")
        return self


class Rung(Config):
    """The shape of one assistant; it has the student's other settings (architecture, dropout, ...)."""

    name: Name | None = Field(None, description="of its stage; default: assistant-1, -2, ... with the prefix")
    layers: Layers = Field(description="number of layers")
    width: Width = Field(description="hidden width")
    heads: Width = Field(description="attention heads; must divide the width")
    kv_heads: Width | None = Field(None, description="llama, qwen2: key/value heads; default: heads")
    intermediate: Width | None = Field(None, description="feed-forward width; default as for a fresh model")


class ChainConfig(Training):
    """Assistants between large teachers and a small student; each learns from earlier ones.

    takd (Mirzadeh et al. 2020, Improved Knowledge Distillation via Teacher Assistant, arXiv 1902.03393): from the one
    before it alone. dgkd (Son et al. 2021, Densely Guided Knowledge Distillation using Multiple Teacher Assistants,
    arXiv 2009.08825): from all before it, ``(1-lam) CE + lam T^2 sum_k KL_k``, with teachers dropped at random.
    """

    mode: Literal["takd", "dgkd"] = Field(
        description="takd: each stage learns from the one before; dgkd: from all before, the teachers included"
    )
    teachers: tuple[TeacherConfig, ...] = Field(min_length=1, description="the models at the top, in order")
    student: ModelConfig = Field(description="the model at the bottom")
    backend: Literal["resident", "offload", "streamed", "sharded"] = Field(
        "resident", description="where assistants' weights live when they teach; those at the top have their own"
    )
    rungs: tuple[Rung, ...] = Field((), description="the assistants' shapes, from the largest to the smallest")
    num_rungs: Layers | None = Field(
        None,
        description="instead of rungs: so many assistants, their sizes a geometric ladder in parameters between the "
        "largest teacher and the student",
    )
    models: dict[Name, ModelConfig] = Field(
        default_factory=dict,
        description="the model of a stage by the stage's name, instead of what the rungs say; filled in by mtkd in "
        "the run folder's copy for everything that it derives",
    )
    direct: bool = Field(
        True, description="also train the student from the teachers alone, with the same steps and data: the control"
    )
    prefix: Annotated[str, Field(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_+-]{0,79})?$")] = Field(
        "", description="before the stages' names assistant-1, ..., student, direct"
    )
    lam: Share = Field(0.5, description="without method: share of the teachers' rows; that of the labels is 1 - lam")
    temperature: Temperature = Field(1.0, description="without method: of the softmax")
    drop: Natural = Field(
        1, description="dgkd without weighting: teachers dropped at random per batch, always fewer than there are"
    )
    overrides: dict[Name, Training] = Field(
        default_factory=dict, description="settings of one stage, by its name; those of the student hold for direct too"
    )

    @property
    def assistants(self) -> list[str]:
        """Names of the assistants' stages, the largest first."""
        number = self.num_rungs or len(self.rungs)
        names = [f"{self.prefix}assistant-{i}" for i in range(1, number + 1)]
        return [rung.name or name for rung, name in zip(self.rungs, names, strict=True)] if self.rungs else names

    @property
    def student_name(self) -> str:
        """Name of the student's stage."""
        return f"{self.prefix}student"

    @property
    def direct_name(self) -> str | None:
        """Name of the control's stage, None without one."""
        return f"{self.prefix}direct" if self.direct else None

    @property
    def teacher_stage(self) -> str | None:
        """The stage of the only teacher; None for several teachers, one from outside the run, and a cached one."""
        ref = self.teachers[0].model.stage
        alone = len(self.teachers) == 1 and self.teachers[0].backend != "cached"
        return ref.model if alone and ref is not None else None

    @property
    def names(self) -> list[str]:
        """Names of all stages of the chain, in order."""
        return [*self.assistants, self.student_name, *([self.direct_name] if self.direct_name else [])]

    def start_of(self, name: str) -> Initial:
        """The start of a stage's model; the direct student has the student's."""
        override = self.overrides.get(self.student_name if name == self.direct_name else name)
        return (override.initial if override else None) or self.initial or "fresh"

    def planned_model(self, name: str) -> ModelConfig | None:
        """The model of a stage; None while it depends on another model."""
        if name in self.models:
            return self.models[name]
        if self.start_of(name) != "fresh":
            return None
        return self.described(name)

    def described(self, name: str) -> ModelConfig | None:
        """The described shape of a stage's model; None when it has to be derived."""
        if name in (self.student_name, self.direct_name):
            return self.student
        if not self.rungs:
            return None
        rung = self.rungs[self.assistants.index(name)]
        like = self.student.model_dump(exclude_unset=True, exclude={*Rung.model_fields, "vocabulary"})
        return ModelConfig.model_validate({**like, **rung.model_dump(exclude_none=True, exclude={"name"})})

    @property
    def resolved(self) -> bool:
        """Whether the model of every stage is known."""
        return all(self.planned_model(name) is not None for name in self.names)

    @model_validator(mode="after")
    def _consistent(self) -> ChainConfig:
        if (not self.rungs) == (self.num_rungs is None):
            raise ValueError("give either `rungs` (shapes) or `num_rungs`")
        if self.student.architecture is None and set(self.models) != set(self.names):
            raise ValueError("the student of a chain is described by architecture, layers, width and heads")
        self._check_shapes()
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"two stages of the chain have one name: {', '.join(self.names)}")
        unknown = sorted((self.models.keys() | self.overrides.keys()) - set(self.names))
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a stage of the chain; they are: {', '.join(self.names)}")
        override = self.overrides.get(self.direct_name or "")
        if override and (more := sorted(override.model_fields_set - _OF_DIRECT)):
            raise ValueError(
                f"overrides.{self.direct_name}: the control has the student's {', '.join(more)}; "
                f"its own may be: {', '.join(sorted(_OF_DIRECT))}"
            )
        self._check_read()
        if not self.resolved and (unseen := [t for t in self.teachers if isinstance(t, OwnTeacher)]):
            raise ValueError(
                f"the shape of teacher {unseen[0].name!r} is not known, for it is your own: no model can be derived "
                "from it; give `rungs`, and initial: fresh"
            )
        return self

    def _check_shapes(self) -> None:
        for position, name in enumerate(self.assistants if self.rungs else ()):
            try:
                self.described(name)
            except ValidationError as error:
                raise ValueError(f"rungs[{position}]: {_reason(error)}") from None

    def _check_read(self) -> None:
        """Refuse settings without an effect."""
        fields = self.model_fields_set
        if "drop" in fields and (self.mode == "takd" or self.weighting is not None):
            raise ValueError("drop is for mode: dgkd without a weighting of its own")
        if (self.method is not None or self.match) and (more := sorted({"lam", "temperature"} & fields)):
            raise ValueError(f"{' and '.join(more)}: of the default method; with `method` or `match`, set it there")


def expand(chain: ChainConfig, stages: Mapping[str, StageConfig]) -> dict[str, StageConfig]:
    """The stages of a run together with those of its chain.

    The chain's stages stand right behind the last stage that they use, so that later stages may use them. An equal
    stage that exists already (in the run folder's copy) keeps its place.

    Raises:
        ValueError: a name is taken by another stage, or a stage of the chain is not valid.
    """
    chain_stages = {name: _stage(chain, name) for name in chain.names}
    for name in chain_stages.keys() & stages.keys():
        if stages[name].model_dump(mode="json") != chain_stages[name].model_dump(mode="json"):
            raise ValueError(
                f"stages.{name}: `chain` makes another stage of this name; rename one of them (chain.prefix), "
                "or remove this one"
            )
    if chain_stages.keys() <= stages.keys():
        return dict(stages)
    others = {name: stage for name, stage in stages.items() if name not in chain_stages}
    models = [t.model for t in chain.teachers] + [m for m in map(chain.planned_model, chain_stages) if m is not None]
    used = {model.stage.stage for model in models if model.stage is not None}
    after = max((i for i, name in enumerate(others, 1) if name in used), default=0)
    order = list(others.items())
    return dict([*order[:after], *chain_stages.items(), *order[after:]])


def _stage(chain: ChainConfig, name: str) -> StageConfig:
    model = chain.planned_model(name)
    assert model is not None, "the chain is resolved"
    teachers = _teachers(chain, name)
    values = _training(chain, name)
    rows = {"method", "match"} & values.keys()
    weighting = values.setdefault("weighting", _default_weighting(chain, len(teachers)))
    if not rows:
        values["method"] = _default_method(chain, weighting, len(teachers))
    try:
        return StageConfig.model_validate(
            {
                "kind": "distill",
                "student": model.model_dump(exclude_unset=True),
                "teachers": [teacher.model_dump(exclude_unset=True) for teacher in teachers],
                **values,
            }
        )
    except ValidationError as error:
        place = "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in error.errors()[0]["loc"])
        raise ValueError(f"chain: stage '{name}'{': ' + place[1:] if place else ''}: {_reason(error)}") from None


def _reason(error: ValidationError) -> str:
    first = error.errors()[0]
    return str(first.get("ctx", {}).get("error", first["msg"]))


def _teachers(chain: ChainConfig, name: str) -> tuple[TeacherConfig, ...]:
    """The teachers of a stage: those of the chain, then the model before it (takd) or all before it (dgkd)."""
    above = chain.assistants if name == chain.student_name else []
    if name in chain.assistants:
        above = chain.assistants[: chain.assistants.index(name)]
    # written only where it is not the default: a stage's identity holds the written fields
    more = {} if chain.backend == "resident" else {"backend": chain.backend}
    assistants = tuple(teacher_config({"model": str(StageRef(other)), **more}) for other in above)
    if chain.mode == "dgkd":
        return (*chain.teachers, *assistants)
    return assistants[-1:] or chain.teachers


def _training(chain: ChainConfig, name: str) -> dict[str, Any]:
    """The chain's settings with the overrides of a stage; the direct student has the student's too."""
    fields = set(Training.model_fields) - {"initial"}
    values = chain.model_dump(exclude_unset=True, include=fields)
    for owner in (chain.student_name, name) if name == chain.direct_name else (name,):
        override = chain.overrides.get(owner)
        if override is None:
            continue
        changes = override.model_dump(exclude_unset=True, include=fields)
        if any(length in changes for length in _LENGTHS):
            values = {key: value for key, value in values.items() if key not in _LENGTHS}
        if "optimizer" in changes:
            changes["optimizer"] = {**(values.get("optimizer") or {}), **(changes["optimizer"] or {})}
        values |= changes
        if values.get("export") != "best":  # the metric has no meaning without the choice
            values.pop("export_metric", None)
    return {key: value for key, value in values.items() if value is not None}


def _default_weighting(chain: ChainConfig, num_teachers: int) -> dict[str, Any]:
    """dgkd drops `drop` teachers per batch, and always leaves one."""
    number = min(chain.drop, num_teachers - 1) if chain.mode == "dgkd" else 0
    return {"name": "drop", "options": {"count": number}} if number else {"name": "uniform"}


def _default_method(chain: ChainConfig, weighting: Mapping[str, Any], num_teachers: int) -> dict[str, Any]:
    """``(1-lam) CE + lam T^2 KL``; dgkd sums the KL of its teachers.

    Weights sum to one, so the sum over K teachers is K times the weighted mean. K counts those that `drop` leaves.
    """
    terms = num_teachers if chain.mode == "dgkd" else 1
    if chain.mode == "dgkd" and weighting["name"] == "drop":
        terms = max(terms - int((weighting.get("options") or {}).get("count", 1)), 1)
    options = {"temperature": chain.temperature, "soft": chain.lam * terms, "hard": 1 - chain.lam}
    return {"name": "kd", "options": options}
