"""Vocabulary-size losses, tile by tile: no [B,L,V] of student or teacher ever exists.

For a tile of positions the student's logits are computed from its hidden states and head, the rows' losses are formed
with ordinary autograd inside the tile, and the gradient with respect to the tile's logits is folded into the gradients
of the hidden states and the head before the next tile. The backward pass then only hands these gradients on, scaled.
Memory: tile * V per live temporary, plus the head's own gradient, for any number of positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtkd.models.features import HeadLogits
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.models.products import product

TileLoss = Callable[[Tensor, Tensor, slice], tuple[Tensor, Tensor]]
"""(student logits [m,V], teacher weights [T,m], their positions) -> (scalar loss, metrics [M])."""


@dataclass
class _Plan:
    """The inputs of the autograd function that have no gradient."""

    columns: int
    transform: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype
    tile: int
    passes: Sequence[TileLoss]
    pieces: Pieces
    differentiate: bool


def tiled(
    head: HeadLogits,
    index: Tensor,
    weights: Tensor,
    tile_loss: TileLoss,
    *,
    tile: int,
    dtype: torch.dtype,
    more: Sequence[TileLoss] = (),
    pieces: Pieces = EVERY_PIECE,
) -> tuple[Tensor, Tensor]:
    """The sum of `tile_loss` over tiles of the positions `index`, differentiable in the head's parts and the weights.

    Args:
        head: the student's logits; `hidden` [B,L,H].
        index: flat positions that count, [n]; may be empty, then loss and gradients are zero, not missing.
        weights: teacher weights at these positions, [T,n].
        tile_loss: scalar loss of one tile, already divided by the global denominators, and metrics to be summed.
        tile: positions per tile.
        dtype: of the head's matrix products (bfloat16 under autocast); losses and sums are float32.
        more: further passes over every tile, whose values add up: what one reads need not be there for the next.
        pieces: how positions are cut into tiles, and tiles into chunks.
    Returns:
        (loss, metrics): scalars [] and [M].
    """
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])[index]
    # The grad mode is read here, because inside an autograd function it is always off.
    plan = _Plan(head.columns, head.transform, dtype, tile, (tile_loss, *more), pieces, torch.is_grad_enabled())
    return _Tiled.apply(hidden, head.weight, head.bias, weights, plan)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        needs = tuple(plan.differentiate and need for need in ctx.needs_input_grad)
        folded = _Folded(hidden, weight, bias, weights, plan, needs)
        # A rank without positions goes through one empty tile: a gradient that is missing on one rank would make the
        # others wait for it for ever.
        tiles = plan.pieces.of(max(hidden.shape[0], 1), plan.tile)
        total, metrics = _sum_pairs([folded.step(positions, any(needs[:4])) for positions in tiles])
        ctx.folded = folded
        ctx.mark_non_differentiable(metrics)
        return total, metrics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_metrics: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.folded is None:
            raise RuntimeError("a tiled loss can go through backward only once: its gradients were handed over")
        grads = ctx.folded.grads
        # No reference stays here, so autograd may adopt the head's gradient instead of copying it.
        ctx.folded = None
        # Also by 1, as it is under either engine: to ask would make the host wait for the whole forward pass.
        for grad in grads:
            if grad is not None:
                grad.mul_(grad_loss)
        return (*grads, None)


def _sum_pairs(pairs: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(sum of losses, sum of metrics)."""
    losses, metrics = zip(*pairs, strict=True)
    return torch.stack(losses).sum(), torch.stack(metrics).sum(0)


class _Folded:
    """The running gradients of one pass and the work of one tile."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        plan: _Plan,
        needs: tuple[bool, ...],
    ) -> None:
        self.plan, self.weights = plan, weights
        self.hidden = hidden.to(plan.dtype)  # [n,H]
        self.weight = weight[: plan.columns].to(plan.dtype)  # [V,H]
        self.bias = None if bias is None else bias[: plan.columns].float()  # [V]
        self.grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        # [H,V] and not [V,H]: the products that add to it are twice as fast this way round.
        self.grad_weight = weight.new_zeros(weight.shape[::-1], dtype=torch.float32) if needs[1] else None
        self.grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs[2] else None
        self.grad_weights = torch.zeros_like(weights) if needs[3] else None
        head = None if self.grad_weight is None else self.grad_weight.t()
        self.grads: list[Tensor | None] = [self.grad_hidden, head, self.grad_bias, self.grad_weights]

    def step(self, positions: slice, differentiate: bool) -> tuple[Tensor, Tensor]:
        """Loss and metrics of one tile; its gradient is folded in."""
        hidden = self.hidden[positions]  # [m,H]
        logits = product(hidden, self.weight).float()  # [m,V]
        if self.bias is not None:
            logits += self.bias
        once = len(self.plan.passes) == 1
        # In a single pass the logits of a chunk are not needed again: their place holds the gradient.
        total = logits if once or not differentiate else torch.zeros_like(logits)
        parts = []
        for tile_loss in self.plan.passes:
            for inside in self.plan.pieces.chunks(max(len(hidden), 1), logits):
                whole = slice(positions.start + inside.start, positions.start + inside.stop)
                if differentiate:
                    loss, metrics, grad = self._differentiate(tile_loss, logits[inside], whole)
                    if once:
                        total[inside] = grad
                    else:
                        total[inside] += grad
                    parts.append((loss, metrics))
                else:
                    parts.append(self._loss(tile_loss, logits[inside], self.weights[:, whole].detach(), whole))
        if differentiate:
            self._fold(total, hidden, positions)
        return _sum_pairs(parts)

    def _differentiate(
        self, tile_loss: TileLoss, logits: Tensor, positions: slice
    ) -> tuple[Tensor, Tensor, Tensor | float]:
        """Loss, metrics and the gradient with respect to the logits (0 when no row depends on them)."""
        logits = logits.detach().requires_grad_()
        weights = self.weights[:, positions].detach().requires_grad_(self.grad_weights is not None)
        inputs = [logits, weights] if self.grad_weights is not None else [logits]
        with torch.enable_grad():
            loss, metrics = self._loss(tile_loss, logits, weights, positions)
            # Where all rows of a chunk are masked out, the loss depends on nothing.
            grads = torch.autograd.grad(loss, inputs, allow_unused=True) if loss.requires_grad else [None, None]
        if self.grad_weights is not None and grads[1] is not None:
            self.grad_weights[:, positions] += grads[1]
        return loss.detach(), metrics.detach(), 0.0 if grads[0] is None else grads[0]

    def _loss(self, tile_loss: TileLoss, logits: Tensor, weights: Tensor, positions: slice) -> tuple[Tensor, Tensor]:
        transform = self.plan.transform
        return tile_loss(logits if transform is None else transform(logits), weights, positions)

    def _fold(self, grad: Tensor, hidden: Tensor, positions: slice) -> None:
        columns = self.plan.columns
        if self.grad_bias is not None:
            self.grad_bias[:columns] += grad.sum(0)
        grad = grad.to(self.plan.dtype)
        if self.grad_hidden is not None:
            self.grad_hidden[positions] = product(grad, self.weight.t()).to(self.grad_hidden.dtype)
        if self.grad_weight is not None:
            self.grad_weight[:, :columns] += product(hidden.t(), grad.t())
