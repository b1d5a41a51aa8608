"""Laws of losses on logits: in tiles and with several teachers, the same value and gradients as the plain form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.errors import LawBroken
from mtkd.losses.laws import NUMERIC_LABELS, TOLERANCE, Options, difference
from mtkd.losses.spec import LOSSES, LossSpec
from mtkd.models.features import HeadLogits
from mtkd.models.forward import number_format
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses
from mtkd.objective.tiles import tiled


def check_tiled(loss: str | LossSpec, options: Options | None = None) -> None:
    """A loss on logits is the same in tiles as over all positions at once, and with several teachers as their sum.

    In float32 to 1e-6 of the largest entry, plus the loss's own rounding. With bfloat16 products the error against
    float32 is at most twice (values) and three times (gradients) that of plain autocast: flash-attention's rule.

    Raises:
        LawBroken: with the tile size and the tensor that differ.
        ValueError: for a loss that does not read logits.
    """
    spec = LOSSES.find(loss) if isinstance(loss, str) else loss
    if "logits" not in spec.inputs:
        raise ValueError(f"loss '{spec.name}' does not read logits")
    # What depends on the other examples of a batch is refused where there are tiles.
    for law in TILED_LAWS if "batch" not in spec.needs else (_ensemble_law,):
        law(spec, options or {})


@dataclass(frozen=True)
class _Head:
    """A student's head, two teachers' logits and their weights at n of 20 positions."""

    parts: tuple[Tensor, ...]  # hidden [4,5,H], weight [V+3,H], bias [V+3], weights [2,n]
    index: Tensor  # [n]
    tile_loss: Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
    columns: int
    transform: Callable[[Tensor], Tensor] | None


_PARTS = ("hidden states", "head", "head's bias", "teacher weights")


def _head(spec: LossSpec, options: Options, seed: int, count: int, capped: bool) -> _Head:
    generator = torch.Generator().manual_seed(seed)
    columns = 1 if spec.name in NUMERIC_LABELS else 37
    shapes = ((4, 5, 16), (columns + 3, 16), (columns + 3,), (2, count))
    hidden, weight, bias, weights = (torch.randn(shape, generator=generator) for shape in shapes)
    parts = tuple(x.requires_grad_() for x in (hidden, weight / 4, bias, weights.abs()))
    mask = torch.arange(count) % 5 != 3
    teachers = list(torch.randn(2, count, columns, generator=generator))
    if spec.labels:
        numbers, classes = (
            torch.randn(count, generator=generator),
            torch.randint(columns, (count,), generator=generator),
        )
        teachers = [numbers if spec.name in NUMERIC_LABELS else classes] * 2

    def tile_loss(student: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        losses = [w * _losses(spec, student, t[at], mask[at], options) for w, t in zip(weights, teachers, strict=True)]
        total = torch.stack(losses).sum() / 7
        return total, total.detach()[None]

    cap: Callable[[Tensor], Tensor] | None = (lambda x: 5 * torch.tanh(x / 5)) if capped else None
    index = torch.randperm(20, generator=generator)[:count].sort().values
    return _Head(parts, index, tile_loss, columns, cap)


def _losses(spec: LossSpec, student: Tensor, teacher: Tensor, mask: Tensor, options: Options) -> Tensor:
    """The loss per position; a float64 student keeps its precision, which `LossSpec` would not."""
    if student.dtype != torch.float64:
        return spec(student, teacher, mask, options)
    teacher = teacher.double() if teacher.is_floating_point() else teacher
    return spec.function(student, teacher, mask, **dict(options)).masked_fill(~mask, 0)


def _whole(head: _Head, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(loss, gradients of the parts), all positions at once, under plain autocast for bfloat16."""
    exact = dtype == torch.float64
    parts = tuple(x.detach().double().requires_grad_() for x in head.parts) if exact else head.parts
    hidden, weight, bias, weights = parts
    with number_format("cpu", dtype):
        rows, columns = hidden.reshape(20, -1)[head.index], head.columns
        logits = torch.nn.functional.linear(rows, weight[:columns], bias[:columns])
    logits = logits if exact else logits.float()
    loss, _ = head.tile_loss(head.transform(logits) if head.transform else logits, weights, slice(None))
    return loss.detach(), *_gradients(loss, parts)


def _in_tiles(head: _Head, tile: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight, bias, weights = head.parts
    student = HeadLogits(hidden, weight, bias, head.columns, head.transform)
    loss, _ = tiled(student, head.index, weights, head.tile_loss, tile=tile, dtype=dtype)
    return loss.detach(), *_gradients(loss, head.parts)


def _gradients(loss: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parts, allow_unused=True, materialize_grads=True)


def _same_in_tiles_law(spec: LossSpec, options: Options) -> None:
    """Tiles that divide the positions and tiles that do not, padded columns, with and without a soft cap.

    Errors count in units of a tensor's largest entry over a few draws. The tolerance grows by twice the error that the
    loss has over all positions at once: terms that cancel are allowed their rounding.
    """
    heads = [_head(spec, options, seed, 12, capped=seed % 2 == 1) for seed in range(4)]
    exact, plain = ([_whole(head, dtype) for head in heads] for dtype in (torch.float64, torch.float32))
    for tile in (1, 4, 5, 12, 50):
        tiled_values = [_in_tiles(head, tile, torch.float32) for head in heads]
        for i, what in enumerate(("loss", *_PARTS)):
            tiles, whole, wanted = (torch.stack([x[i] for x in side]) for side in (tiled_values, plain, exact))
            gap, allowed = difference(tiles, wanted), 2 * difference(whole, wanted) + TOLERANCE
            if not gap <= allowed:
                text = f"{what} is off by {gap:.1e} of its size in tiles of {tile}; {allowed:.1e} would be rounding"
                raise LawBroken("tiled", spec.name, text)
        if any(bool(x[i][head.columns :].any()) for x, head in zip(tiled_values, heads, strict=True) for i in (2, 3)):
            raise LawBroken("tiled", spec.name, "padded vocabulary columns have a gradient")


def _empty_law(spec: LossSpec, options: Options) -> None:
    """No positions: zero loss, and gradients that exist and are zero (other ranks wait for them)."""
    head = _head(spec, options, 0, 0, capped=False)
    hidden, weight, bias, weights = head.parts
    student = HeadLogits(hidden, weight, bias, head.columns)
    loss, _ = tiled(student, head.index, weights, head.tile_loss, tile=4, dtype=torch.float32)
    if not loss.requires_grad:
        raise LawBroken("tiled", spec.name, "no positions give a loss without gradients")
    gradients = torch.autograd.grad(loss, head.parts[:3], allow_unused=True)
    if float(loss.detach()) != 0 or any(x is None or bool(x.any()) for x in gradients):
        raise LawBroken("tiled", spec.name, f"no positions give a loss of {float(loss.detach())}, or no zero gradient")


def _bfloat16_law(spec: LossSpec, options: Options) -> None:
    """Errors against float32 next to those of plain autocast; each error is the largest over a few draws."""
    tiled_errors, plain_errors = [0.0] * 5, [0.0] * 5
    for seed in range(8):
        head = _head(spec, options, seed, 12, capped=False)
        exact = _whole(head, torch.float32)
        for errors, values in (
            (tiled_errors, _in_tiles(head, 5, torch.bfloat16)),
            (plain_errors, _whole(head, torch.bfloat16)),
        ):
            for i, (x, y) in enumerate(zip(values, exact, strict=True)):
                errors[i] = max(errors[i], float((x - y).abs().max()))
    for i, what in enumerate(("loss", *_PARTS)):
        factor = 3 if i else 2
        if not tiled_errors[i] <= factor * plain_errors[i] + TOLERANCE:
            text = f"bfloat16 error of the {what} is {tiled_errors[i]:.1e}, plain autocast's {plain_errors[i]:.1e}"
            raise LawBroken("tiled in bfloat16", spec.name, text)


def _ensemble_law(spec: LossSpec, options: Options) -> None:
    """Several teachers, through `teacher_term` where declared, are the plain sum, in value and gradients.

    With and without a mask.
    """
    if spec.labels:
        return
    generator = torch.Generator().manual_seed(0)
    student, *teachers = 2 * torch.randn(4, 12, 37, generator=generator)
    leaves = (student.requires_grad_(), torch.rand(3, 12, generator=generator).requires_grad_())
    row = Row(Match(loss=spec.name, options=dict(options)), spec, spec.name, (((0, 0),),) * 3)
    for mask in (torch.arange(12) % 5 != 3, None):
        every = torch.ones(12, dtype=torch.bool) if mask is None else mask
        together = ensemble_losses(row, student, teachers, leaves[1], mask)
        plain = torch.stack([w * spec(student, t, every, options) for w, t in zip(leaves[1], teachers, strict=True)])
        sides = [(x, *_gradients(x.sum(), leaves)) for x in (together, plain.sum(0))]
        for what, ensemble, wanted in zip(("values", "student's gradient", "weights' gradient"), *sides, strict=True):
            gap = difference(ensemble.detach(), wanted.detach())
            if not gap <= TOLERANCE:
                raise LawBroken("ensemble", spec.name, f"{what} of three teachers are off by {gap:.1e} of their size")


TILED_LAWS = (_same_in_tiles_law, _empty_law, _bfloat16_law, _ensemble_law)
