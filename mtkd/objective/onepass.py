"""Rows that need the student at the columns of cached teachers only: `kl`, `soft_ce` and the label row in one pass.

Such a loss is linear in the teacher's probabilities up to a term without the student, so k columns and the tail's mass
are all it reads. The rows of a temperature share one exponential over the student's logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtkd.losses.distributions import negative_entropy, no_term
from mtkd.losses.labels import ce
from mtkd.models.features import Logits, SparseLogits, SparseRows
from mtkd.objective.compile import Row
from mtkd.objective.kept import read

# Below this share of the teacher's tail mass, tail^2 / teacher's tail, the student's is summed again without the kept
# columns: as a difference in float32 it is off by 2e-7, and the gradient by teacher's tail * 2e-7 / tail^2 < 1e-4.
_SURE = 2e-3
# Above this ratio of the teacher's tail to the student's, the tail's pull on the kept columns, which cancels there, is
# left out instead of added and taken away again: the rest of it would be ratio * 1e-7.
_SHARP = 100.0
# Below this share of the teacher's tail the entropy of the student's is summed from the tail's own columns: as the
# difference of two sums of about 10 nats in float32, divided by the tail's mass, it is off by 2e-6 / 0.05.
_FAR = 0.05


@dataclass
class _Group:
    """Cached teachers whose values stack: their numbers, and the columns that they know at all n selected positions."""

    teachers: list[int]
    temperature: float
    ids: Tensor  # [n,T,k]
    probs: Tensor  # [n,T,k]
    tail: Tensor  # [n,T], a probability; 0 for drawn columns
    constant: Tensor  # [n,T], sum_v p log p: the part of a KL divergence without the student


class ReadOnce:
    """Rows that need the student at the columns of cached teachers only: one pass over its logits per temperature.

    Attributes:
        rest: numbers of the teachers that are not cached: the losses here leave them out.

    Args:
        rows: the logits rows of the stage. Every selected position counts in all of them.
        logits: of all teachers.
        index: flat positions that are selected, [n].
        labels: there, [n].
    """

    def __init__(self, rows: Sequence[Row], logits: Sequence[Logits], index: Tensor, labels: Tensor) -> None:
        linear = [row for row in rows if _is_linear(row)]
        cached = [k for k, x in enumerate(logits) if isinstance(x, SparseLogits)] if linear else []
        read_rows = {k: read(logits[k], index) for k in cached}
        known = {k: rows for k, rows in read_rows.items() if isinstance(rows, SparseRows)}
        self.rest = [k for k in range(len(logits)) if k not in known]
        self.labels = labels
        self.keys = {row.key for row in linear} if known else set()
        self.needs_mean = any(row.spec.teacher_term is no_term for row in linear)
        if any(teacher.temperature == 1 for teacher in known.values()):
            self.keys |= {row.key for row in rows if row.spec.function is ce and not row.match.options.get("smoothing")}
        self.groups = _groups(known)

    def serves(self, row: Row) -> bool:
        """Whether the row's losses against the cached teachers come from here."""
        return bool(self.groups) and row.key in self.keys

    def at(self, student: Tensor, positions: slice) -> OneTile:
        """The rows' losses of a tile."""
        return OneTile(self, student, positions)


def _is_linear(row: Row) -> bool:
    """``T^2 (c(p_T) - sum_v p_T log p_S)`` with a c that is known here."""
    spec = row.spec
    return (
        not row.from_labels
        and row.match.ensemble == "losses"
        and spec.mixes(row.match.options)
        and spec.teacher_term in (negative_entropy, no_term)
    )


def _groups(known: Mapping[int, SparseRows]) -> list[_Group]:
    """Teachers by what they hold: equal k and temperature stack; drawn columns are filled up to the same number."""
    kinds: dict[tuple[float, int], list[int]] = {}
    for k, rows in known.items():
        kinds.setdefault((rows.temperature, rows.ids.shape[1] if rows.tail is not None else -1), []).append(k)
    groups = []
    for (temperature, _), members in kinds.items():
        group = [known[k] for k in members]
        width = max(r.ids.shape[1] for r in group)
        probs = torch.stack([_widened(r.log_probs.exp(), width) for r in group], 1)
        ids = torch.stack([_widened(r.ids, width) for r in group], 1)
        tails = [torch.zeros(len(r), device=r.ids.device) if r.tail is None else r.tail.exp() for r in group]
        constants = [_negative_entropy(r) for r in group]
        groups.append(_Group(members, temperature, ids, probs, torch.stack(tails, 1), torch.stack(constants, 1)))
    return groups


def _widened(values: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]))


def _negative_entropy(rows: SparseRows) -> Tensor:
    """``sum_v p log p`` of k + 1 outcomes; of drawn columns the stored one of the whole distribution, [n]."""
    if rows.entropy is not None:
        return -rows.entropy
    value = (rows.log_probs.exp() * rows.log_probs).sum(-1)
    return value if rows.tail is None else value + rows.tail.exp() * rows.tail


class OneTile:
    """One tile's student against all cached teachers; each temperature's pass runs when a row first asks."""

    def __init__(self, once: ReadOnce, student: Tensor, positions: slice) -> None:
        self._once, self._student, self._positions = once, student, positions
        self._done: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def losses(self, row: Row, weights: Tensor) -> Tensor:
        """Per-position loss of a row that is served over all cached teachers, [m].

        Args:
            weights: [T,m].
        """
        once = self._once
        if row.from_labels:
            number = next(i for i, group in enumerate(once.groups) if group.temperature == 1)
            return self._pass(number)[1]
        _, factor = row.spec.temperature(row.match.options)
        if not row.match.weighted:
            weights = torch.ones_like(weights)
        total: Tensor | None = None
        for number, group in enumerate(once.groups):
            cross, _, inside = self._pass(number)
            if row.spec.teacher_term is no_term:
                values = cross + inside
            else:
                values = cross + group.constant[self._positions]
            own = torch.stack([weights[k] for k in group.teachers], 1)  # a list as an index would be waited for
            losses = (own * values).sum(-1)
            total = losses if total is None else total + losses
        assert total is not None
        return total if factor == 1 else factor * total

    def _pass(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """(cross entropy [m,T], label's [m], entropy of the student's tail times the teacher's tail [m,T])."""
        if number not in self._done:
            group, at = self._once.groups[number], self._positions
            labels = self._once.labels[at] if group.temperature == 1 else None
            self._done[number] = _CrossEntropies.apply(
                self._student,
                group.ids[at],
                group.probs[at],
                group.tail[at],
                labels,
                group.temperature,
                self._once.needs_mean,
            )
        return self._done[number]


class _CrossEntropies(torch.autograd.Function):
    """``-sum_kept p log s - t log(1 - sum_kept s)`` of T teachers and ``-log s(label)``, from one exponential.

    s = softmax(student / temperature), p and t a teacher's kept probabilities and tail. The gradient with respect to
    the student's scaled logits is ``s (P + t - t/r)`` everywhere, and at kept columns ``s t/r - p`` on top of it, with
    P the kept mass and r the student's mass outside; for the label ``s - 1 at the label``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # [m,V]
        ids: Tensor,  # [m,T,k]
        probs: Tensor,  # [m,T,k]
        tail: Tensor,  # [m,T]
        labels: Tensor | None,  # [m]
        temperature: float,
        needs_mean: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        probs, tail = probs.to(student.dtype), tail.to(student.dtype)
        scaled = student if temperature == 1 else student / temperature
        largest = scaled.amax(-1, keepdim=True)
        powers = (scaled - largest).exp_()
        total = powers.sum(-1, keepdim=True)
        log_total = largest + total.log()
        flat = ids.flatten(1)
        log_kept = (scaled.gather(-1, flat) - log_total).view_as(probs)
        kept = (powers.gather(-1, flat) / total).view_as(probs)
        outside, log_outside, coarse = _outside(scaled, powers, total, ids, kept, tail)
        cross = -(probs * log_kept).sum(-1) - tail * log_outside
        inside = cross.new_zeros(cross.shape)
        if needs_mean:
            # Sum over the others of s log s: a soft target in the tail's shape adds their entropy to the cross entropy.
            sums = ((powers * scaled).sum(-1, keepdim=True) / total - log_total) - (kept * log_kept).sum(-1)
            inside = tail * _entropy_outside(scaled, ids, tail, outside, sums)
        label = cross.new_zeros(len(cross))
        if labels is not None:
            label = (log_total - scaled.gather(-1, labels[:, None])).squeeze(-1)
        ctx.save_for_backward(powers, total, ids, probs, tail, kept, outside, labels)
        ctx.temperature, ctx.coarse = temperature, coarse
        ctx.mark_non_differentiable(inside)
        return cross, label, inside

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_label: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        powers, total, ids, probs, tail, kept, outside, labels = ctx.saved_tensors
        grad, grad_label = grad / ctx.temperature, grad_label / ctx.temperature
        whole = tail / outside
        sharp = whole > _SHARP
        ratio = whole.masked_fill(sharp, 0)
        flat = ids.flatten(1)
        everywhere = (grad * (probs.sum(-1) + tail - ratio)).sum(-1)
        there = (grad[..., None] * (ratio[..., None] * kept - probs)).flatten(1)
        if labels is not None:
            everywhere = everywhere + grad_label
            flat, there = torch.cat([flat, labels[:, None]], -1), torch.cat([there, -grad_label[:, None]], -1)
        result = powers * (everywhere[:, None] / total)
        result.scatter_add_(-1, flat, there)
        # Sharp is coarse too: outside^2 >= 2e-3 tail, with a tail of 1 at most, is tail / outside <= 23.
        if ctx.coarse and bool(sharp.any()):
            position, teacher = sharp.nonzero(as_tuple=True)
            others = powers[position].scatter(-1, ids[position, teacher], 0) / total[position]
            result.index_add_(0, position, others * -(grad * whole)[sharp][:, None])
        return result, None, None, None, None, None, None


def _outside(
    scaled: Tensor, powers: Tensor, total: Tensor, ids: Tensor, kept: Tensor, tail: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """The student's mass outside the kept columns and its log, [m,T], and whether it was summed anywhere.

    One minus the kept mass where that is exact enough; else the mass is summed over the other columns. A GPU is waited
    for here once per tile: summing everywhere would read the tile's logits once more per teacher.
    """
    tiny = torch.finfo(powers.dtype).tiny
    outside = (1 - kept.sum(-1)).clamp_min(tiny)
    coarse = outside.square() < _SURE * tail
    if not bool(coarse.any()):
        return outside, outside.log(), False
    position, teacher = coarse.nonzero(as_tuple=True)
    others = powers[position].scatter(-1, ids[position, teacher], 0)
    outside[position, teacher] = (others.sum(-1) / total[position, 0]).clamp_min(tiny)
    log_outside, lost = outside.log(), coarse & (outside <= tiny)
    if bool(lost.any()):  # less than the smallest float, whose log is -87
        position, teacher = lost.nonzero(as_tuple=True)
        log_others = _others(scaled, ids, position, teacher).logsumexp(-1) - scaled[position].logsumexp(-1)
        log_outside[position, teacher] = log_others.clamp_min(torch.finfo(powers.dtype).min)
    return outside, log_outside, True


def _entropy_outside(scaled: Tensor, ids: Tensor, tail: Tensor, outside: Tensor, sums: Tensor) -> Tensor:
    """Entropy of the student over the columns not kept, from their sums of s log s, [m,T]; 0 without a tail."""
    # Drawn columns have no tail, and their unused places repeat a column: `outside` means nothing there.
    entropy = (outside.log() - sums / outside).masked_fill(tail == 0, 0)
    far = outside < _FAR * tail
    if bool(far.any()):
        position, teacher = far.nonzero(as_tuple=True)
        log_others = _others(scaled, ids, position, teacher).log_softmax(-1)
        entropy[position, teacher] = -negative_entropy(log_others, log_others.exp())
    return entropy


def _others(scaled: Tensor, ids: Tensor, position: Tensor, teacher: Tensor) -> Tensor:
    """The student's scaled logits at some positions, -inf at the columns that a teacher keeps there."""
    return scaled[position].scatter(-1, ids[position, teacher], -torch.inf)
