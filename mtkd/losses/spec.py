"""A registered loss: its function, what it reads, and the laws it keeps; `LOSSES` holds all of them.

    mtkd.LOSSES["kl"](student, teacher, mask, temperature=2.0)      one value per position

Options are keywords, named as in the YAML; an unknown one is refused with the nearest known name. A decorated function
takes any keywords, because each loss has options of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mtkd.data.batch import NO_LABEL
from mtkd.registry import Decorated, Registry, check_options, keyword_parameters

TOKEN_VECTORS = ("logits", "hidden", "embedding", "cls")

NEEDS = ("labels", "columns", "batch", "behaviour")
"""``labels``: the function has a keyword `labels`, the class or token at each position or `NO_LABEL`, None without any;
``columns``: the teacher's whole rows, which a cache of tokens does not keep; ``batch``: the value at a position depends
on the other positions of its micro-batch; ``behaviour``: only words that the student wrote count. `labels` are
these words then, and a keyword `behaviour` the log-probability of each when it was written, None without any."""


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
        signed: the value may be negative.
        constant_weights: the value holds weights that depend on the student and count as constants, so that the
            gradient is not the value's derivative.
        needs: what it needs besides its two sides, of `NEEDS`.
    """

    name: str
    function: Callable[..., Any]
    inputs: tuple[str, ...]
    labels: bool = False
    zero_at_equality: bool = True
    teacher_term: Callable[..., Any] | None = None
    constant_weights: bool = False
    needs: tuple[str, ...] = ()
    signed: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only parameters a row may set under ``options``."""
        parameters = keyword_parameters(self.function)
        given = {"labels", "behaviour"}.intersection(self.needs)  # by the objective, not by a row
        return {name: p for name, p in parameters.items() if name not in given}

    def mixes(self, options: Mapping[str, Any]) -> bool:
        """Whether teachers may meet in one mixture: not where each has its own support (option ``top``) or scale."""
        return self.teacher_term is not None and not options.get("top") and not options.get("standardise")

    def temperature(self, options: Mapping[str, Any]) -> tuple[float, float]:
        """(temperature, factor) of a loss on distributions: its options, or their defaults; (1, 1) for one without."""
        defaults = {name: parameter.default for name, parameter in self.options().items()}
        values = {**defaults, **options}
        temperature = float(values.get("temperature", 1.0))
        return temperature, temperature**2 if values.get("scale", True) else 1.0

    def __call__(
        self,
        student: Any,
        teacher: Any,
        mask: Any = None,
        options: Mapping[str, Any] | None = None,
        labels: Any = None,
        behaviour: Any = None,
        **named: Any,
    ) -> Any:
        """The loss per position; 0 where `mask` is False, even for NaN and infinity there.

        Masking comes before the arithmetic: ``inf * 0`` after it would be NaN, in the gradient too.

        Args:
            student: [n,V], [B,H], [B,L,H], or attention [B,A,L,*] (axis 2 is the query position); token logits may be
                [B,L,V] too.
            teacher: the same leading axes; or labels, one per position.
            mask: one entry per position, bool or 0 and 1: [n], [B] or [B,L]. None: every position counts, which saves
                three copies of vocabulary size.
            options: of the loss, as a row has them.
            labels, behaviour: one per position, for a loss that needs them; others ignore them.
            named: the same as keywords; these win.

        Raises:
            UserError: a keyword that is no option of this loss, or of the wrong type.
            ValueError: a mask of another shape, or a value that the loss refuses.
        """
        if named:
            check_options(named, self.options(), f"loss '{self.name}'")
        chosen = {**(options or {}), **named}
        positions = self._positions(student, mask)
        if student.dim() == 3 and "hidden" not in self.inputs and "logits" in self.inputs:
            flat = teacher.flatten() if self.labels else teacher.flatten(0, 1)
            marks, labels, behaviour = (None if x is None else x.flatten() for x in (mask, labels, behaviour))
            return self(student.flatten(0, 1), flat, marks, chosen, labels, behaviour).reshape(positions)
        as_given = labels is None or mask is None
        given = {"labels": labels if as_given else labels.masked_fill(~mask.bool(), NO_LABEL), "behaviour": behaviour}
        chosen |= {name: value for name, value in given.items() if name in self.needs}
        if mask is None:
            every = student.new_ones(positions, dtype=bool)
            teacher = teacher if self.labels else teacher.float()
            return self._shaped(self.function(student.float(), teacher, every, **chosen), every)
        mask = mask.bool()
        padded = ~mask
        student = student.float().masked_fill(_over(padded, student), 0)
        teacher = (teacher if self.labels else teacher.float()).masked_fill(_over(padded, teacher), 0)
        values = self.function(student, teacher, mask, **chosen)
        return self._shaped(values, mask).masked_fill(padded, 0)

    def _positions(self, student: Any, mask: Any) -> tuple[int, ...]:
        """The axes of `student` over positions; a mask of another shape is refused."""
        positions = (student.shape[0], student.shape[2]) if student.dim() == 4 else tuple(student.shape[:-1])
        if mask is not None and tuple(mask.shape) != positions:
            raise ValueError(
                f"the mask of loss '{self.name}' has shape {list(mask.shape)}; one entry per position is "
                f"{list(positions)}"
            )
        return positions

    def _shaped(self, values: Any, mask: Any) -> Any:
        """`values`, refused unless there is one per position: a mean would silently be spread over them again."""
        if values.shape != mask.shape:
            raise ValueError(
                f"loss '{self.name}' returns shape {list(values.shape)}; one value per position is {list(mask.shape)}"
            )
        return values


LOSSES: Registry[LossSpec] = Registry("loss", "mtkd.losses")


def loss(
    name: str,
    *,
    inputs: tuple[str, ...] = TOKEN_VECTORS,
    labels: bool = False,
    zero_at_equality: bool = True,
    teacher_term: Callable[..., Any] | None = None,
    constant_weights: bool = False,
    needs: tuple[str, ...] = (),
    signed: bool = False,
) -> Callable[[Decorated], Decorated]:
    """Register a loss function under `name`; see `LossSpec` for the flags."""

    unknown = sorted(set(needs) - set(NEEDS))
    if unknown:
        raise ValueError(f"loss '{name}': needs is of {', '.join(NEEDS)}; found {', '.join(unknown)}")

    def decorate(function: Decorated) -> Decorated:
        spec = LossSpec(name, function, inputs, labels, zero_at_equality, teacher_term, constant_weights, needs, signed)
        LOSSES.add(name, spec)
        return function

    return decorate


def _over(mask: Any, values: Any) -> Any:
    """`mask` ([n], [B] or [B,L]) with axes added so that it broadcasts over `values`."""
    if values.dim() == 4 and mask.dim() == 2:
        return mask[:, None, :, None]
    return mask.reshape(mask.shape + (1,) * (values.dim() - mask.dim()))
