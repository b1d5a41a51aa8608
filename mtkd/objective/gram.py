"""Inner products of the teachers' gradients with respect to the student's logits, tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models.features import Features, SparseRows
from mtkd.models.forward import logits_of
from mtkd.objective.compile import Row
from mtkd.objective.kept import completed, read
from mtkd.objective.objective import Counts, Objective
from mtkd.objective.targets import positions_of
from mtkd.weightings.gradients import has_gradient

_AT_ONCE = 2**18
"""Entries of a gradient that are multiplied in float64 at one time: 2 MB per teacher. Not tuned."""


@torch.no_grad()
def gram(
    objective: Objective,
    batch: Batch,
    teachers: list[Features],
    counts: Counts,
    whole_head: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Tensor:
    """``G_jk = <dd_j/dz, dd_k/dz>`` of a micro-batch, [T,T] float64; a step's is the sum over its batches and ranks.

    d_k is the loss of the stage's weighted rows on logits with teacher k alone; z are the student's logits at the
    positions that count. The student must be in eval mode: dropout would draw another z than training does.

    Args:
        counts: global numbers of positions of the step.
        whole_head: gathers a sharded output head; entered after the forward pass, whose own end shards it again.
    """
    # A forward pass of its own: the weights of the step's first micro-batch depend on the gradients of its last.
    logits = logits_of(objective.student, batch, objective.dtype)
    rows = [row for row in objective.rows if has_gradient(row.match)]
    at = positions_of(rows, batch, objective.token_level)
    total = torch.zeros(len(teachers), len(teachers), dtype=torch.float64, device=at.index.device)
    with whole_head():
        student, teacher_logits = logits.in_dtype(objective.dtype), objective.teacher_logits(teachers)
        for piece in objective.pieces.of(len(at.index), objective.tile):
            index, has_label = at.index[piece], at.has_label[piece]  # [m]
            tile = student.rows(index)  # [m,V]
            targets = (read(each, index) for each in teacher_logits)
            gradients = [_gradient(objective, rows, tile, target, has_label, counts) for target in targets]
            # Products of a tile at a time: the T gradients of all positions would be T tensors of vocabulary size.
            total += _products(torch.stack(gradients))  # [T,m*V] -> [T,T]
    return total


def _products(gradients: Tensor) -> Tensor:
    """Inner products of the rows of [T,n], [T,T], summed in float64.

    In float32 two teachers whose gradients differ by less than 1e-4 of their size would lose half of the difference's
    digits. A part at a time, so that no float64 copy of all logits exists.
    """
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients.device)
    for part in gradients.split(_AT_ONCE, 1):
        exact = part.double()
        total += exact @ exact.t()
    return total


def _gradient(
    objective: Objective,
    rows: list[Row],
    student: Tensor,
    teacher: Tensor | SparseRows,
    has_label: Tensor,
    counts: Counts,
) -> Tensor:
    """The gradient of one teacher's loss on a tile with respect to the student's logits [m,V], flat [m*V]."""
    if isinstance(teacher, SparseRows) and teacher.tail is None:
        raise UserError(
            "drawn targets are unbiased in a gradient, not in inner products of gradients",
            where="@stage.weighting",
            todo="make the cache with targets: top, or take another weighting",
        )
    leaf = student.clone().requires_grad_()  # [m,V]; logits and not parameters, so one backward pass of the loss alone
    loss = student.new_zeros(())
    with torch.enable_grad():
        for row in rows:
            kind = row.counted(objective.token_level)
            whole, options = completed(row, leaf, teacher)
            values = row.spec(leaf, whole, has_label if kind == "targets" else None, options)
            loss = loss + row.match.weight / max(counts[kind], 1) * values.sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.reshape(-1)
