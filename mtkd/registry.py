"""The registries of losses, weightings, methods, tasks and data sources, and how plug-ins add to them.

Nothing heavy is imported here: built-ins register when a registry is first read, plug-ins when a run names them
(``plugins: [path/to/file.py]``) or when their package declares the entry-point group ``mtkd.plugins``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from mtkd.errors import UserError, nearest

Value = TypeVar("Value")

BUILT_IN = "mtkd"
GIVEN = ("teachers", "facts")
"""Parameters of a weighting's constructor that mtkd fills in: the teachers' names; the stage's `StageFacts`."""
ENTRY_POINT_GROUP = "mtkd.plugins"

# Where the names registered just now come from; `load_plugins` sets it while it imports a plug-in.
_origin = BUILT_IN


class Registry(Mapping[str, Value], Generic[Value]):
    """Names to values of one kind. Reading it imports the module that holds the built-ins."""

    def __init__(self, kind: str, module: str) -> None:
        self.kind = kind
        self._module = module
        self._values: dict[str, Value] = {}
        self._origins: dict[str, str] = {}

    def add(self, name: str, value: Value) -> None:
        """Register `value`; raises UserError when the name is taken by somebody else."""
        if _origin != BUILT_IN:
            self._load()  # so that a plug-in is compared with every built-in, imported or not
        taken = self._origins.get(name)
        if taken is not None:
            raise UserError(
                f"{self.kind} '{name}' is already registered by {taken}",
                where=f"plug-in {_origin}",
                todo="choose another name; a plug-in cannot replace an existing one",
            )
        self._values[name] = value
        self._origins[name] = _origin

    def find(self, name: str, where: str = "") -> Value:
        """The value of `name`; raises UserError with the nearest known name."""
        self._load()
        if name not in self._values:
            raise UserError(
                f"unknown {self.kind}",
                where=where,
                found=name,
                allowed=sorted(self._values),
                todo=nearest(name, self._values),
            )
        return self._values[name]

    def origin(self, name: str) -> str:
        """`mtkd` for a built-in, else the plug-in's file or package."""
        self._load()
        return self._origins[name]

    def forget(self, origin: str) -> None:
        """Drop everything registered by `origin` (a plug-in whose import failed half-way)."""
        for name in [n for n, o in self._origins.items() if o == origin]:
            del self._values[name], self._origins[name]

    def _load(self) -> None:
        if self._module not in sys.modules:
            global _origin
            before, _origin = _origin, BUILT_IN
            try:
                importlib.import_module(self._module)
            finally:
                _origin = before

    def __getitem__(self, name: str) -> Value:
        self._load()
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._values))

    def __len__(self) -> int:
        self._load()
        return len(self._values)


@dataclass(frozen=True)
class LossSpec:
    """A loss function and what the objective must know about it.

    Attributes:
        function: ``(student, teacher, mask, *, options) -> per-position values``, float32, un-reduced.
        inputs: the features it accepts, e.g. ``("logits",)`` or ``("scores", "probs")``.
        labels: the "teacher" argument is a tensor of labels instead of a teacher's feature.
        zero_at_equality: exactly 0 when student and teacher are equal.
        teacher_term: c, for a loss of the form ``T^2 (c(p_T) - sum_v p_T log p_S)`` with options `temperature` T and
            `scale`: its part without the student, of (log p_T, p_T), [n,V] each, to [n]. Such losses are
            linear in p_T up to c, so several teachers meet in one mixture before the student is looked at.
        constant_weights: the value holds weights that depend on the student and count as constants, so that the
            gradient is not the value's derivative.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    labels: bool = False
    zero_at_equality: bool = True
    teacher_term: Callable[..., Any] | None = None
    constant_weights: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters a row may set under ``options``."""
        return keyword_parameters(self.function)

    def mixes(self, options: Mapping[str, Any]) -> bool:
        """Whether teachers may meet in one mixture: not where each has its own support (option ``top``)."""
        return self.teacher_term is not None and not options.get("top")

    def temperature(self, options: Mapping[str, Any]) -> tuple[float, float]:
        """(temperature, factor) of a loss on distributions: its options, or their defaults; (1, 1) for one without."""
        defaults = {name: parameter.default for name, parameter in self.options().items()}
        values = {**defaults, **options}
        temperature = float(values.get("temperature", 1.0))
        return temperature, temperature**2 if values.get("scale", True) else 1.0

    def __call__(self, student: Any, teacher: Any, mask: Any, options: Mapping[str, Any] | None = None) -> Any:
        """The loss per position, 0 where `mask` is False whatever stands there (NaN and infinity included).

        Masking comes before the arithmetic: ``inf * 0`` after it would be NaN, in the gradient too.

        Args:
            student: [n,V], [B,H], [B,L,H], or attention [B,A,L,*] (axis 2 is the query position).
            teacher: the same leading axes; or labels shaped like `mask`.
            mask: bool, one entry per position: [n], [B] or [B,L]; None when every position of [n,V] counts, which
                saves three copies of vocabulary size.
        """
        if mask is None:
            every = student.new_ones(student.shape[0], dtype=bool)
            teacher = teacher if self.labels else teacher.float()
            return self._shaped(self.function(student.float(), teacher, every, **dict(options or {})), every)
        padded = ~mask
        student = student.float().masked_fill(_over(padded, student), 0)
        if self.labels:
            teacher = teacher.masked_fill(padded, 0)
        else:
            teacher = teacher.float().masked_fill(_over(padded, teacher), 0)
        values = self.function(student, teacher, mask, **dict(options or {}))
        return self._shaped(values, mask).masked_fill(padded, 0)

    def _shaped(self, values: Any, mask: Any) -> Any:
        """`values`, refused unless there is one per position: a mean would silently be spread over them again."""
        if values.shape != mask.shape:
            raise ValueError(
                f"loss '{self.name}' returns shape {list(values.shape)}; one value per position is {list(mask.shape)}"
            )
        return values


@dataclass(frozen=True)
class WeightingSpec:
    """A weighting class and the laws it declares.

    Attributes:
        sums_to_one: over the teachers, at every position.
        needs_labels: the weights depend on labels.
        negative: a weight may be negative: then a teacher is one to move away from.
    """

    name: str
    cls: type
    sums_to_one: bool = True
    needs_labels: bool = False
    negative: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """The parameters of its constructor that a stage may set; those of `GIVEN` come from mtkd."""
        given = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)  # not nn.Module's *args
        parameters = inspect.signature(self.cls).parameters
        return {n: p for n, p in parameters.items() if n not in GIVEN and p.kind in given}


STEPS = ("pre-train", "fine-tune", "prediction")
"""The distillations a method may consist of, in their order: on plain text; on the task's data; the task's labels."""


@dataclass(frozen=True)
class MethodSpec:
    """A method of the literature: a function from its options to the rows it is made of.

    Attributes:
        function: ``(**options) -> {label: Match}``; a method of several steps has an option ``step``.
        steps: those of `STEPS` that its paper distils at.
        must_be_equal: what its paper needs equal on both sides.
        variants: option sets that the paper tries side by side; the method table unites their rows.
    """

    name: str
    function: Callable[..., Any]
    steps: tuple[str, ...]
    source: str
    must_be_equal: tuple[str, ...] = field(default=())
    variants: tuple[Mapping[str, Any], ...] = field(default=({},))

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword parameters a stage may set under ``method.options``."""
        return dict(inspect.signature(self.function).parameters)

    def rows(self, options: Mapping[str, Any], step: str = "") -> dict[str, Any]:
        """Label -> Match row, at a step ("": the one that the options name, or the first).

        Raises:
            ValueError: a step the method does not have, or a value its function refuses.
        """
        step = step or options.get("step", self.steps[0])
        if step not in self.steps:
            raise ValueError(f"step is one of {', '.join(self.steps)}; found {step!r}")
        named = {"step": step} if "step" in self.options() else {}
        return dict(self.function(**{**options, **named}))


def _over(mask: Any, values: Any) -> Any:
    """`mask` ([n], [B] or [B,L]) with axes added so that it broadcasts over `values`."""
    if values.dim() == 4 and mask.dim() == 2:
        return mask[:, None, :, None]
    return mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))


LOSSES: Registry[LossSpec] = Registry("loss", "mtkd.losses")
WEIGHTINGS: Registry[WeightingSpec] = Registry("weighting", "mtkd.weightings")
METHODS: Registry[MethodSpec] = Registry("method", "mtkd.methods")
SOURCES: Registry[Callable[..., Any]] = Registry("data source", "mtkd.data.sources")
TASKS: Registry[Any] = Registry("task", "mtkd.data.tasks")

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

TOKEN_VECTORS = ("logits", "hidden", "embedding", "cls")


def loss(
    name: str,
    *,
    inputs: tuple[str, ...] = TOKEN_VECTORS,
    labels: bool = False,
    zero_at_equality: bool = True,
    teacher_term: Callable[..., Any] | None = None,
    constant_weights: bool = False,
) -> Callable[[Decorated], Decorated]:
    """Register a loss function under `name`; see `LossSpec` for the flags."""

    def decorate(function: Decorated) -> Decorated:
        spec = LossSpec(name, function, inputs, labels, zero_at_equality, teacher_term, constant_weights)
        LOSSES.add(name, spec)
        return function

    return decorate


def weighting(
    name: str, *, sums_to_one: bool = True, needs_labels: bool = False, negative: bool = False
) -> Callable[[Decorated], Decorated]:
    """Register a `Weighting` class under `name`; see `WeightingSpec` for the flags."""

    def decorate(cls: Decorated) -> Decorated:
        WEIGHTINGS.add(name, WeightingSpec(name, cls, sums_to_one, needs_labels, negative))  # type: ignore[arg-type]
        return cls

    return decorate


def method(
    name: str,
    *,
    steps: tuple[str, ...],
    source: str,
    must_be_equal: tuple[str, ...] = (),
    variants: tuple[Mapping[str, Any], ...] = ({},),
) -> Callable[[Decorated], Decorated]:
    """Register a function ``(**options) -> {label: Match}`` as a method; see `MethodSpec`.

    Raises:
        ValueError: steps that are none of `STEPS`, or several of them and no option ``step`` to choose one by.
    """

    def decorate(function: Decorated) -> Decorated:
        spec = MethodSpec(name, function, steps, source, must_be_equal, variants)
        if not steps or not set(steps) <= set(STEPS) or (len(steps) > 1 and "step" not in spec.options()):
            raise ValueError(
                f"method '{name}': steps are of {', '.join(STEPS)}, and several need an option `step`; found {steps}"
            )
        METHODS.add(name, spec)
        return function

    return decorate


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(given: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], where: str) -> None:
    """Refuse an option nobody reads, a missing one, and one whose type differs from its default's.

    Raises:
        UserError: naming the option, the known ones and the nearest of them.
    """
    for name, value in given.items():
        if name not in parameters:
            raise UserError(
                "unknown option",
                where=f"{where}.options",
                found=name,
                allowed=sorted(parameters) or "none",
                todo=nearest(name, parameters),
            )
        default = parameters[name].default
        if default is inspect.Parameter.empty or default is None:
            continue
        accepted = (int, float) if isinstance(default, float) else type(default)
        swapped = isinstance(value, bool) != isinstance(default, bool)  # bool is an int in Python, not here
        if isinstance(default, tuple):
            accepted = (tuple, list)  # type: ignore[assignment]
        if swapped or not isinstance(value, accepted):
            raise UserError(
                "an option has the wrong type",
                where=f"{where}.options.{name}",
                found=value,
                allowed=f"a value like the default {default!r}",
            )
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in given:
            raise UserError("a required option is missing", where=f"{where}.options", found="nothing", allowed=name)


_loaded_plugins: dict[str, str] = {}  # file or entry point -> the origin its names are registered under


def load_plugins(paths: tuple[str, ...] = (), base: Path | None = None) -> None:
    """Import plug-in files (relative to `base`) and installed plug-in packages, once each.

    Raises:
        UserError: when a file is missing, fails to import, or wants a name that is taken.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _import_plugin(entry.name, entry.load)
    for path in paths:
        file = (base or Path.cwd()) / path
        if file.suffix != ".py" or not file.is_file():
            raise UserError("a plug-in must be an existing .py file", where="plugins", found=str(path))
        _import_plugin(str(path), partial(_import_file, file.resolve()), key=str(file.resolve()))


def plugin_origin(file: Path) -> str:
    """The origin under which a loaded plug-in file registered its names."""
    return _loaded_plugins[str(file.resolve())]


def _import_file(file: Path) -> None:
    name = f"mtkd_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _import_plugin(origin: str, load: Callable[[], object], key: str = "") -> None:
    global _origin
    key = key or f"entry point {origin}"
    if key in _loaded_plugins:
        return
    for registry in (LOSSES, WEIGHTINGS, METHODS, SOURCES, TASKS):
        registry._load()  # a plug-in's own import of a built-in module must not make that module's names the plug-in's
    _origin = origin
    try:
        load()
        _loaded_plugins[key] = origin
    except Exception as error:
        for registry in (LOSSES, WEIGHTINGS, METHODS, SOURCES, TASKS):
            registry.forget(origin)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"the plug-in cannot be imported: {type(error).__name__}: {error}", where=f"plugins: {origin}"
        ) from error
    finally:
        _origin = BUILT_IN
