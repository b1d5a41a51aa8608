"""Laws of losses: shape, sign, zero at equality, padding, finite numbers, gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL
from mtkd.errors import LawBroken
from mtkd.losses.spec import LOSSES, LossSpec

Options = Mapping[str, Any]

TOLERANCE = 1e-5
"""Of float32 values near 1: some 160 roundings of 2**-24, more than any case has operations on one number."""

EXTREME = 1e4  # size of the largest inputs a loss must survive
NUMERIC_LABELS = ("label_mse",)  # losses whose labels are numbers, not classes

_GARBAGE = (float("nan"), float("inf"), -float("inf"), 1e30)
_MASK = torch.arange(6) < torch.tensor([[6], [2], [4]])  # three sequences of 6, 2 and 4 tokens
_HEADS, _HEAD_WIDTH, _WIDTH, _COLUMNS = 4, 8, 7, 11


def check_loss(loss: str | LossSpec, options: Options | None = None) -> None:
    """Every law of a loss, under the given keyword options.

    Raises:
        LawBroken: at the first law it does not keep.
    """
    spec = LOSSES.find(loss) if isinstance(loss, str) else loss
    for law in LOSS_LAWS:
        for case in _bank(spec):
            law(spec, case, options or {})


@dataclass(frozen=True)
class Case:
    """One input of a loss: student and teacher (or labels) of a feature, and which positions count."""

    what: str
    student: Tensor
    teacher: Tensor
    mask: Tensor

    @property
    def position_axes(self) -> tuple[int, ...]:
        """Axes of the student over positions: maps have queries and keys, vectors per head only one."""
        if self.student.dim() < 4:
            return (self.mask.dim() - 1,)
        return (2, 3) if self.what.endswith(("scores", "probs")) else (2,)

    def __str__(self) -> str:
        return f"{self.what} {list(self.student.shape)} {str(self.student.dtype).removeprefix('torch.')}"


def _bank(spec: LossSpec, scale: float = 2.0) -> Iterator[Case]:
    """Inputs for every feature that the loss reads; finite, but for -inf where a score is masked."""
    vectors, attention = (3, 6, _WIDTH), (3, _HEADS, 6, 6)
    columns = 1 if spec.name in NUMERIC_LABELS else _COLUMNS
    shapes: dict[str, tuple[tuple[int, ...], Tensor]] = {
        "logits": ((9, columns), torch.arange(9) % 4 != 2),
        "nsp_logits": ((5, 2), torch.arange(5) != 1),
        "cls": ((5, _WIDTH), torch.arange(5) != 1),
        **dict.fromkeys(("hidden", "embedding"), (vectors, _MASK)),
        **dict.fromkeys(("scores", "probs"), (attention, _MASK)),
        **dict.fromkeys(("query", "key", "value"), ((3, _HEADS, 6, _HEAD_WIDTH), _MASK)),
    }
    for seed, feature in enumerate(spec.inputs):
        generator = torch.Generator().manual_seed(seed)
        shape, mask = shapes[feature]
        student, teacher = (scale * torch.randn(shape, generator=generator) for _ in range(2))
        if spec.labels and spec.name in NUMERIC_LABELS:
            teacher = torch.randn(shape[:-1], generator=generator)
        elif spec.labels:
            teacher = torch.randint(shape[-1], shape[:-1], generator=generator)
        if feature not in ("scores", "probs"):
            yield Case(feature, student, teacher, mask)
            continue
        for kind, seen in (("", torch.ones(6, 6)), ("causal ", torch.ones(6, 6).tril())):
            blocked = ~(mask[:, None, None, :] & seen.bool())
            sides = [x.masked_fill(blocked, -torch.inf) for x in (student, teacher)]
            if feature == "probs":
                sides = [torch.softmax(x, -1) for x in sides]
            yield Case(kind + feature, sides[0], sides[1], mask)


def _evaluated(spec: LossSpec, case: Case, options: Options) -> tuple[Tensor, Tensor]:
    """(values, gradient of their sum with respect to the student)."""
    student = case.student.clone().requires_grad_()
    values = spec(student, case.teacher.clone(), case.mask, options)
    if not values.requires_grad:
        return values, torch.zeros_like(student)
    (gradient,) = torch.autograd.grad(values.sum(), student)
    return values.detach(), gradient


def _exact(spec: LossSpec, case: Case, options: Options) -> tuple[Tensor, Tensor]:
    """`_evaluated` in float64, which a `LossSpec` would not keep."""
    student = case.student.double().requires_grad_()
    floats = case.teacher.is_floating_point()
    # Padded labels may be any number: a spec never hands them on.
    teacher = case.teacher.double() if floats else case.teacher.masked_fill(~case.mask, 0)
    values = spec.function(student, teacher, case.mask, **dict(options)).masked_fill(~case.mask, 0)
    if not values.requires_grad:
        return values, torch.zeros_like(student)
    return values.detach(), torch.autograd.grad(values.sum(), student)[0]


def _padded(mask: Tensor, values: Tensor, axis: int) -> Tensor:
    """True where `values` stand at a padded position along `axis`; the mask's other axis, if any, is the batch."""
    shape = [size if i == axis or (i == 0 and mask.dim() == 2) else 1 for i, size in enumerate(values.shape)]
    return (~mask).reshape(shape).expand_as(values)


def _spoiled(case: Case, garbage: float) -> Case:
    """The case with garbage at every padded position, of keys too."""
    student, teacher = case.student, case.teacher
    for axis in case.position_axes:
        student = student.masked_fill(_padded(case.mask, student, axis), garbage)
        if teacher.is_floating_point():
            teacher = teacher.masked_fill(_padded(case.mask, teacher, axis), garbage)
        else:
            teacher = teacher.masked_fill(~case.mask, NO_LABEL if garbage != 1e30 else 10**9)
    return replace(case, student=student, teacher=teacher)


def _lengthened(case: Case) -> Case:
    """The case with two more padded positions."""

    def longer(values: Tensor, axes: tuple[int, ...], fill: float) -> Tensor:
        for axis in axes:
            more = list(values.shape)
            more[axis] = 2
            values = torch.cat([values, values.new_full(more, fill)], axis)
        return values

    axes = case.position_axes
    label_axes = axes if case.teacher.dim() == case.student.dim() else (case.mask.dim() - 1,)
    return Case(
        case.what, longer(case.student, axes, 3), longer(case.teacher, label_axes, 2), longer(case.mask, (-1,), False)
    )


def _shape_law(spec: LossSpec, case: Case, options: Options) -> None:
    """One float32 value per position, un-reduced; the same at each call."""
    for dtype in (torch.float32, torch.bfloat16):
        cast = replace(case, student=case.student.to(dtype))
        try:
            values, _ = _evaluated(spec, cast, options)
        except ValueError as error:  # of `LossSpec`, which would spread a mean over the positions otherwise
            raise LawBroken("shape", spec.name, f"{error} ({cast})") from error
        if values.shape != case.mask.shape or values.dtype != torch.float32:
            raise LawBroken("shape", spec.name, f"{list(values.shape)} {values.dtype} for {cast}")
        if not torch.equal(_evaluated(spec, cast, options)[0], values):
            raise LawBroken("repeatable", spec.name, f"two calls differ for {cast}")


def _non_negative_law(spec: LossSpec, case: Case, options: Options) -> None:
    """No value is below 0, where none is declared to be."""
    if spec.signed:
        return
    lowest = float(_evaluated(spec, case, options)[0].min())
    if not lowest >= -TOLERANCE:
        raise LawBroken("non-negative", spec.name, f"{lowest} for {case}")


def _equality_law(spec: LossSpec, case: Case, options: Options) -> None:
    """0 when the student equals the teacher, where declared."""
    if spec.labels or not spec.zero_at_equality:
        return
    values, _ = _evaluated(spec, replace(case, student=case.teacher), options)
    if not float(values.abs().max()) < TOLERANCE:
        raise LawBroken("zero at equality", spec.name, f"{float(values.abs().max())} for {case}")


def _padding_law(spec: LossSpec, case: Case, options: Options) -> None:
    """The content of padded positions, NaN included, and their number change nothing."""
    values, gradient = _evaluated(spec, case, options)
    for garbage in _GARBAGE:
        spoiled = _spoiled(case, garbage)
        spoiled_values, slope = _evaluated(spec, spoiled, options)
        if not (torch.equal(spoiled_values, values) and torch.equal(slope, gradient)):
            raise LawBroken("padding", spec.name, f"{garbage} at padded positions changes {case}")
    padded = _padded(case.mask, gradient, case.position_axes[0])
    if bool(values[~case.mask].any()) or bool(gradient[padded].any()):
        raise LawBroken("padding", spec.name, f"padded positions have a value or a gradient for {case}")
    # In float64: other shapes are other kernels, and values near 0 may be differences of large numbers.
    sides = [_exact(spec, one, options) for one in (_lengthened(case), case)]
    for what, longer, wanted in zip(("values", "gradient"), *sides, strict=True):
        inner = longer[tuple(slice(size) for size in wanted.shape)]
        if difference(inner, wanted) > TOLERANCE:
            raise LawBroken("padding", spec.name, f"more padding changes the {what} of {case}")


def _finite_law(spec: LossSpec, case: Case, options: Options) -> None:
    """Values and gradients are finite in bfloat16 and for inputs of 1e4, equal and opposite sides included."""
    extreme = [c for c in _bank(spec, EXTREME) if c.what == case.what]
    if not spec.labels and "probs" not in case.what:
        extreme += [replace(c, teacher=-c.student) for c in extreme] + [replace(c, teacher=c.student) for c in extreme]
    for one in (case, *extreme):
        for dtype in (torch.float32, torch.bfloat16):
            teacher = one.teacher if spec.labels else one.teacher.to(dtype)
            cast = replace(one, student=one.student.to(dtype), teacher=teacher)
            for what, result in zip(("value", "gradient"), _evaluated(spec, cast, options), strict=True):
                if not bool(result.isfinite().all()):
                    raise LawBroken("finite", spec.name, f"a {what} is not finite for {cast}, sizes up to {EXTREME}")


def _gradient_law(spec: LossSpec, case: Case, options: Options) -> None:
    """The gradient with respect to the student is that of the value (finite differences in float64).

    Where a loss declares that its value holds constants which depend on the student, finite differences say nothing.
    """
    if spec.constant_weights:
        return
    teacher = case.teacher if spec.labels and not case.teacher.is_floating_point() else case.teacher.double()

    def values(student: Tensor) -> Tensor:
        values = spec.function(student, teacher, case.mask, **dict(options))
        return values.masked_fill(~case.mask, 0)

    student = case.student.double().requires_grad_()
    try:
        torch.autograd.gradcheck(values, (student,))
    except (RuntimeError, ValueError) as error:  # ValueError: nothing requires a gradient
        raise LawBroken("gradient", spec.name, f"{str(error).splitlines()[0]} for {case}") from error


LOSS_LAWS = (_shape_law, _non_negative_law, _equality_law, _padding_law, _finite_law, _gradient_law)


def difference(values: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest entry wanted; infinite where not a number."""
    if wanted.numel() == 0:
        return 0.0
    gap = (values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(gap.detach().nan_to_num(torch.inf))
