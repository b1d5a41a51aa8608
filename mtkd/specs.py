"""What is known of a registered loss, weighting or method, and how each is called from Python.

    mtkd.LOSSES["kl"](student, teacher, mask, temperature=2.0)      one value per position
    mtkd.METHODS["kd"](temperature=4.0)                             its rows, by label
    mtkd.WEIGHTINGS["fixed"](teachers=("a", "b"), weights={"a": 3.0, "b": 1.0})      a `Weighting`

Options are keywords, named as in the YAML; an unknown one is refused with the nearest known name. These calls and the
decorated functions take any keywords, because each entry has options of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mtkd.errors import UserError, nearest

GIVEN = ("teachers", "facts")
"""Parameters of a weighting's constructor that mtkd fills in: the teachers' names; the stage's `StageFacts`."""


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

    def __call__(
        self, student: Any, teacher: Any, mask: Any = None, options: Mapping[str, Any] | None = None, **named: Any
    ) -> Any:
        """The loss per position, 0 where `mask` is False whatever stands there (NaN and infinity included).

        Masking comes before the arithmetic: ``inf * 0`` after it would be NaN, in the gradient too.

        Args:
            student: [n,V], [B,H], [B,L,H], or attention [B,A,L,*] (axis 2 is the query position); token logits may be
                [B,L,V] too.
            teacher: the same leading axes; or labels, one per position.
            mask: one entry per position, bool or 0 and 1: [n], [B] or [B,L]. None: every position counts, which saves
                three copies of vocabulary size.
            options: of the loss, as a row has them. named: the same as keywords; these win.

        Raises:
            UserError: a keyword that is no option of this loss, or of the wrong type.
            ValueError: a mask of another shape, or a value that the loss refuses.
        """
        if named:
            check_options(named, self.options(), f"loss '{self.name}'")
        chosen = {**(options or {}), **named}
        positions = (student.shape[0], student.shape[2]) if student.dim() == 4 else student.shape[:-1]
        if mask is not None and tuple(mask.shape) != tuple(positions):
            raise ValueError(
                f"the mask of loss '{self.name}' has shape {list(mask.shape)}; one entry per position is "
                f"{list(positions)}"
            )
        if student.dim() == 3 and "hidden" not in self.inputs and "logits" in self.inputs:
            flat = teacher.flatten() if self.labels else teacher.flatten(0, 1)
            values = self(student.flatten(0, 1), flat, None if mask is None else mask.flatten(), chosen)
            return values.reshape(positions)
        if mask is None:
            every = student.new_ones(positions, dtype=bool)
            teacher = teacher if self.labels else teacher.float()
            return self._shaped(self.function(student.float(), teacher, every, **chosen), every)
        mask = mask.bool()
        padded = ~mask
        student = student.float().masked_fill(_over(padded, student), 0)
        if self.labels:
            teacher = teacher.masked_fill(padded, 0)
        else:
            teacher = teacher.float().masked_fill(_over(padded, teacher), 0)
        values = self.function(student, teacher, mask, **chosen)
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

    def __call__(self, **named: Any) -> Any:
        """The weighting, of these options; `teachers` (names) and `facts` (`StageFacts`) where it asks for them.

        Raises:
            UserError: a keyword that is no option of it, or of the wrong type, or one of the two that it lacks.
        """
        where = f"weighting '{self.name}'"
        asked = [name for name in GIVEN if name in inspect.signature(self.cls).parameters]
        check_options({n: v for n, v in named.items() if n not in asked}, self.options(), where)
        if missing := [name for name in asked if name not in named]:
            raise UserError(
                "it is made for the teachers of a stage",
                where=where,
                found=f"no {' and no '.join(missing)}",
                todo="give teachers=(names, in order), or facts=mtkd.weightings.StageFacts(...)",
            )
        made = self.cls(**named)
        made.negative = self.negative
        return made


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

    def __call__(self, **named: Any) -> dict[str, Any]:
        """Label -> Match row, of these options.

        Raises:
            UserError: a keyword that is no option of it, or of the wrong type.
            ValueError: a value that the method refuses.
        """
        check_options(named, self.options(), f"method '{self.name}'")
        return self.rows(named)


def _over(mask: Any, values: Any) -> Any:
    """`mask` ([n], [B] or [B,L]) with axes added so that it broadcasts over `values`."""
    if values.dim() == 4 and mask.dim() == 2:
        return mask[:, None, :, None]
    return mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))


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
        _check_numbers(value, f"{where}.options.{name}")
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


def _check_numbers(value: Any, where: str) -> None:
    """Refuse numbers, in lists and mappings too, that overflow where they are used, whatever they mean."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_numbers(item, f"{where}[{position}]")
    elif isinstance(value, int | float):
        largest = 1e38 if isinstance(value, float) else 1_000_000_000
        if not abs(value) <= largest:  # true for NaN too
            raise UserError("a number out of range", where=where, found=value, allowed=f"-{largest:g} to {largest:g}")
