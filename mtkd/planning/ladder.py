"""Derive the shapes of a chain's models: a geometric ladder of sizes, and layers taken from the model above."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from pydantic import ValidationError
from transformers import PretrainedConfig

from mtkd.config import ChainConfig, ModelConfig, RunConfig, StageConfig, StageRef
from mtkd.errors import UserError
from mtkd.models.info import ModelInfo, model_info
from mtkd.models.numbers import count_parameters
from mtkd.registry import TASKS

NEAR = 0.1
"""Shapes this near to a target in log parameters (10%) are equally near: the most proportionate one is taken."""

# Widths are multiples of about a sixteenth of the largest one, a power of two between these.
_SMALLEST_UNIT, _LARGEST_UNIT, _WIDTH_STEPS = 8, 128, 16

Count = Callable[[ModelConfig], int]


@dataclass(frozen=True)
class Model:
    """A model of the chain as others see it: how to load it, its shape, its number of parameters."""

    config: ModelConfig
    info: ModelInfo
    parameters: int


@dataclass(frozen=True)
class Shapes:
    """Every shape between two models, in layers, width and heads; heads divide the width evenly.

    Args:
        top: the larger model.
        student: description of the smaller one, whose other settings every shape has.
        count: gives the exact number of parameters of a description.
        fixed_width: all widths and heads are the top's, for models made of its layers.
    """

    top: ModelInfo
    student: ModelConfig
    count: Count
    fixed_width: bool = False

    @cached_property
    def candidates(self) -> list[tuple[ModelConfig, int]]:
        """All shapes: (description, parameters)."""
        assert self.student.layers is not None
        low, high = sorted((self.student.layers, self.top.num_layers))
        shapes = []
        for width, heads in self._widths():
            # Layers are alike, so the number of parameters is a straight line in their number.
            one, two = (self.count(self._shape(n, width, heads)) for n in (1, 2))
            shapes += [(self._shape(n, width, heads), one + (n - 1) * (two - one)) for n in range(low, high + 1)]
        return shapes

    def nearest(self, target: float, share: float, below: float) -> tuple[ModelConfig, int]:
        """The shape nearest to `target` parameters in the logarithm, smaller than `below`.

        Args:
            share: position of the rung between the top (0) and the student (1), which decides among near shapes.

        Raises:
            UserError: there is no smaller shape.
        """
        allowed = [candidate for candidate in self.candidates if candidate[1] < below]
        if not allowed:
            raise UserError(
                "there are not so many different shapes between the teacher and the student",
                where="chain.num_rungs",
                todo="ask for fewer, or give the shapes as `rungs`",
            )
        return min(allowed, key=lambda candidate: self._distance(candidate, target, share))

    def _distance(self, candidate: tuple[ModelConfig, int], target: float, share: float) -> tuple[float, float, float]:
        shape, parameters = candidate
        assert shape.layers and shape.width and self.student.layers and self.student.width  # noqa: PT018
        apart = abs(math.log(parameters / target))
        skew = abs(math.log(shape.layers) - _between(self.top.num_layers, self.student.layers, share))
        skew += abs(math.log(shape.width) - _between(self.top.width, self.student.width, share))
        return (0.0 if apart <= NEAR else apart, skew, apart)

    def _widths(self) -> list[tuple[int, int]]:
        """Pairs of width and heads: for each width the number of heads nearest to the proportionate one."""
        assert self.student.width is not None
        assert self.student.heads is not None
        if self.fixed_width:
            return [(self.top.width, self.top.num_heads)]
        low, high = sorted((self.student.width, self.top.width))
        unit = 1 << max(high // _WIDTH_STEPS, 1).bit_length() - 1
        unit = min(max(unit, _SMALLEST_UNIT), _LARGEST_UNIT)
        widths = {low, high, *range(-(-low // unit) * unit, high + 1, unit)}
        fewest, most = sorted((self.student.heads, self.top.num_heads))
        pairs = []
        for width in sorted(widths):
            share = (math.log(width) - math.log(high)) / (math.log(low) - math.log(high)) if low < high else 1.0
            target = _between(self.top.num_heads, self.student.heads, share)
            # An even width per head: rotary positions turn pairs.
            valid = [h for h in range(fewest, most + 1) if width % h == 0 and (width // h) % 2 == 0]
            valid = [h for h in valid if h % self._grouped == 0]
            if valid:
                pairs.append((width, min(valid, key=lambda h: abs(math.log(h) - target))))
        return pairs

    @property
    def _grouped(self) -> int:
        """Query heads per key/value head, as in the student."""
        assert self.student.heads is not None
        return self.student.heads // (self.student.kv_heads or self.student.heads)

    def _shape(self, layers: int, width: int, heads: int) -> ModelConfig:
        student = self.student
        assert student.width is not None
        values = {
            **student.model_dump(exclude_unset=True, exclude={"vocabulary"}),
            "layers": layers,
            "width": width,
            "heads": heads,
        }
        if student.kv_heads:
            values["kv_heads"] = heads // self._grouped
        if student.intermediate:
            values["intermediate"] = max(8, round(student.intermediate / student.width * width / 8) * 8)
        return ModelConfig.model_validate(values)


@dataclass(frozen=True)
class Look:
    """A planner's knowledge of the models of a run, without weights.

    Args:
        stage: plans a stage, so that later ones know its models.
        model_config: (stage, model, where) -> its configuration.
        made: model of a stage -> its configuration.
    """

    stage: Callable[[str], object]
    model_config: Callable[[StageConfig, ModelConfig, str], PretrainedConfig]
    made: dict[str, PretrainedConfig]


def complete(config: RunConfig, planner: Callable[[RunConfig], Look]) -> RunConfig:
    """The run with the models and stages of its chain; unchanged when nothing is missing.

    Reads configurations of models and the tokenizer, no weights. The same input gives the same shapes.

    Raises:
        UserError: a shape cannot be derived, or the stages that result are not valid.
    """
    chain = config.chain
    if chain is None or chain.resolved:
        return config
    shapes = {name: chain.described(name) for name in chain.names}
    # Stand-ins under the right names: enough to find the tokenizer and the teachers.
    stand_in = _with_models(config, {n: chain.models.get(n) or m or chain.student for n, m in shapes.items()})
    sizes = _Sizes(stand_in, planner(stand_in))
    top = sizes.top()
    if chain.num_rungs:
        shapes |= ladder(chain, top, sizes.count(chain.student), sizes.count)
    models, above = dict(chain.models), top
    for name in chain.names:
        if name not in models:
            shape = shapes[name]
            assert shape is not None, "given, or derived above"
            first = top if name == chain.direct_name else above
            begin = {"fresh": lambda shape, *_: shape, "teacher": from_layers, "slice": from_slice}
            models[name] = begin[chain.start_of(name)](shape, first, f"stages.{name}.student")
        above = sizes.of(name, models[name])
    return _with_models(config, models)


def _with_models(config: RunConfig, models: dict[str, ModelConfig]) -> RunConfig:
    values = config.model_dump(mode="json", exclude_unset=True)
    values["chain"]["models"] = {n: model.model_dump(mode="json", exclude_unset=True) for n, model in models.items()}
    try:
        run = RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(str(first.get("ctx", {}).get("error", first["msg"]))) from None  # it says where
    run._base, run._written = config._base, config._written
    return run


class _Sizes:
    """Sizes of the models around a chain."""

    def __init__(self, config: RunConfig, look: Look) -> None:
        assert config.chain is not None
        self._config, self._look, self._chain = config, look, config.chain
        self._first = config.chain.names[0]
        data = config.data_of(config.stages[self._first])
        self._auto_class = str(TASKS.find(data.task).class_for(data))

    def top(self) -> Model:
        """The largest of the models above the chain, the first of equals."""
        for name in self._config.stages:
            if name == self._first:  # the stages that the chain uses stand before it
                break
            self._look.stage(name)
        stage = self._config.stages[self._first]
        models = []
        for i, teacher in enumerate(self._chain.teachers):
            models.append(
                self._sized(teacher.model, self._look.model_config(stage, teacher.model, f"chain.teachers[{i}]"))
            )
        return max(models, key=lambda model: model.parameters)

    def of(self, name: str, model: ModelConfig) -> Model:
        """The model of a stage of the chain, for the next stage."""
        config = self._look.model_config(self._config.stages[name], model, f"stages.{name}.student")
        self._look.made[name] = config
        return self._sized(ModelConfig(path=str(StageRef(name))), config)

    def count(self, model: ModelConfig) -> int:
        """Parameters of a description."""
        config = self._look.model_config(self._config.stages[self._first], model, "chain.student")
        return count_parameters(config, self._auto_class)

    def _sized(self, model: ModelConfig, config: PretrainedConfig) -> Model:
        return Model(model, model_info(config, self._auto_class), count_parameters(config, self._auto_class))


def ladder(chain: ChainConfig, top: Model, student_parameters: int, count: Count) -> dict[str, ModelConfig]:
    """The assistants' shapes of a chain with `num_rungs`, their parameters a geometric series down to the student's.

    ``P_i = P_teacher^(1-s) P_student^s``, ``s = i / (n + 1)``; each rung is the valid shape nearest to its target.

    Raises:
        UserError: the student is not smaller than the teacher, or there are too few shapes between them.
    """
    if student_parameters >= top.parameters:
        raise UserError(
            "the student of a chain is smaller than its largest teacher",
            where="chain.student",
            found=f"{student_parameters:,} parameters",
            allowed=f"fewer than {top.parameters:,}",
        )
    names = chain.assistants
    shapes = Shapes(top.info, chain.student, count, any(chain.start_of(n) == "teacher" for n in names))
    models: dict[str, ModelConfig] = {}
    below = float(top.parameters)
    for position, name in enumerate(names, 1):
        share = position / (len(names) + 1)
        target = math.exp(_between(top.parameters, student_parameters, share))
        models[name], parameters = shapes.nearest(target, share, below)
        if parameters <= student_parameters:
            raise UserError(
                "there are not so many different shapes between the teacher and the student",
                where="chain.num_rungs",
                found=len(names),
                todo="ask for fewer, or give the shapes as `rungs`",
            )
        below = float(parameters)
    return models


def from_layers(shape: ModelConfig, above: Model, where: str) -> ModelConfig:
    """A model made of evenly chosen layers of the one above it, the last layer among them.

    Args:
        shape: description of the model.
        above: the model that gives the layers.
    Raises:
        UserError: it has another architecture, width or heads, or fewer layers.
    """
    assert shape.layers is not None
    _check_inherited(shape, ("kv_heads", "intermediate"), where)
    info = above.info
    target = {"architecture": shape.architecture, "width": shape.width, "heads": shape.heads}
    source = {"architecture": info.architecture, "width": info.width, "heads": info.num_heads}
    if target != source or shape.layers > info.num_layers or above.config.slice is not None:
        raise UserError(
            "cannot begin with layers of the model above it",
            where=where,
            found=f"{target['architecture']} {shape.layers}x{shape.width}, {shape.heads} heads",
            allowed=f"{info.architecture} {info.num_layers}x{info.width} or fewer layers, {info.num_heads} heads",
            todo="make them equal, or set initial: fresh",
        )
    return _taken(shape, above)


def from_slice(shape: ModelConfig, above: Model, where: str) -> ModelConfig:
    """A model of evenly chosen layers of the one above it, each cut to a smaller width and fewer heads.

    Args:
        shape: description of the model.
        above: the model that is cut; see `mtkd.models.cut`.
    Raises:
        UserError: it has another architecture, or is larger in some dimension.
    """
    assert shape.layers and shape.width and shape.heads  # noqa: PT018
    _check_inherited(shape, (), where)
    info = above.info
    larger = shape.layers > info.num_layers or shape.width > info.width or shape.heads > info.num_heads
    if shape.architecture != info.architecture or larger or above.config.slice is not None:
        raise UserError(
            "cannot be sliced from the model above it",
            where=where,
            found=f"{shape.architecture} {shape.layers}x{shape.width}, {shape.heads} heads",
            allowed=f"{info.architecture} of at most {info.num_layers}x{info.width}, {info.num_heads} heads, uncut",
            todo="make it smaller, or set initial: fresh",
        )
    cut = {name: getattr(shape, name) for name in ("width", "heads", "kv_heads", "intermediate")}
    return _taken(shape, above, {name: value for name, value in cut.items() if value is not None})


def _check_inherited(shape: ModelConfig, also: tuple[str, ...], where: str) -> None:
    """Refuse fields that have no effect, since a model that begins as a part of another one takes them from it."""
    fields = [name for name in (*also, "max_positions", "tie_embeddings") if name in shape.model_fields_set]
    if fields:
        raise UserError(
            "a model that begins as a part of the one above it has these from there",
            where=where,
            found=", ".join(fields),
            todo="drop them, or set initial: fresh",
        )


def _taken(shape: ModelConfig, above: Model, cut: dict[str, int] | None = None) -> ModelConfig:
    """Evenly chosen layers of the model above, `cut` to a slice, with the dropout and vocabulary of `shape`."""
    assert shape.layers is not None
    before = above.config.keep_layers or range(1, above.info.num_layers + 1)
    layers = [before[layer - 1] for layer in even_layers(shape.layers, above.info.num_layers)]
    values = {
        "path": above.config.path,
        "revision": above.config.revision,
        "keep_layers": layers,
        "slice": cut,
        "dropout": shape.dropout,
        "vocabulary": shape.vocabulary,
    }
    return ModelConfig.model_validate({key: value for key, value in values.items() if value is not None})


def even_layers(count: int, of: int) -> list[int]:
    """`count` of the layers 1 to `of`, evenly spread, the last one included: 12 -> 6 gives 2, 4, ..., 12."""
    return [round((i + 1) * of / count) for i in range(count)]


def _between(top: float, bottom: float, share: float) -> float:
    """Log of the geometric mean with weight `share` on the bottom."""
    return (1 - share) * math.log(top) + share * math.log(bottom)
