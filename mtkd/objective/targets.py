"""How several teachers meet in a logits row: their logits a tile at a time, and the row's loss over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtkd.losses.distributions import log_distribution
from mtkd.models.features import DenseLogits, Logits, SparseRows
from mtkd.objective.compile import Row
from mtkd.objective.kept import completed, read
from mtkd.objective.tiles import chunks
from mtkd.registry import LossSpec


class TeacherTiles:
    """Teachers' logits at slices of the selected positions: computed a tile at a time, read in smaller pieces."""

    def __init__(self, logits: Sequence[Logits], index: Tensor, tile: int) -> None:
        self._logits, self._index, self._tile = logits, index, tile
        self._asked: tuple[int, int | None] = (-1, None)
        self._held: list[Tensor | SparseRows] = []

    def __call__(self, positions: slice, only: int | None = None) -> list[Tensor | SparseRows]:
        """T of [m,V], or what is known of a cached one; `positions` lies within one tile, or is everything.

        Args: only: the number of the one teacher that is read; the others' tiles then do not exist.
        """
        size = max(positions.stop - positions.start, self._tile)
        start = positions.start - positions.start % size
        # of what is there: a rank without positions must read as often as the others, for a head may be a collective
        there = min(positions.stop, len(self._index)) - start
        if (start, only) != self._asked or (self._held and len(self._held[0]) < there):
            self._held = []  # the old tile's memory is free before there is a new one
            asked = self._logits if only is None else [self._logits[only]]
            self._asked, self._held = (start, only), [read(t, self._index[start : start + size]) for t in asked]
        return [rows[positions.start - start : positions.stop - start] for rows in self._held]


class TeacherMixture:
    """The weighted teachers of a row of soft targets as one distribution, a tile at a time.

    The teachers take turns: whatever their number, one teacher's tile and the mixture's exist.

    Args:
        row: of several teachers, with a loss that `mixes`. logits: one per teacher, none of a cache.
        index: flat positions, [n]. weights: at these positions, [T,n]; constants. tile: positions per tile.
    """

    def __init__(self, row: Row, logits: Sequence[Logits], index: Tensor, weights: Tensor, tile: int) -> None:
        self._row, self._logits, self._index, self._tile = row, logits, index, tile
        self._weights = weights.detach() if row.match.weighted else torch.ones_like(weights)
        self._start = -1
        self._mixed, self._constant = torch.empty(0), torch.empty(0)

    def losses(self, student: Tensor, positions: slice) -> Tensor:
        """Per-position loss of the row, [m]; `student` [m,V] and `positions` within one tile."""
        start = positions.start - positions.start % self._tile
        if start != self._start:
            self._mixed = self._constant = torch.empty(0)  # free before there are new ones
            self._start = start
            self._mix(slice(start, min(start + self._tile, len(self._index))))
        inside = slice(positions.start - start, positions.stop - start)
        spec, options = self._row.spec, self._row.match.options
        return _soft_target_losses(spec, student, self._mixed[inside], self._constant[inside], None, options)

    @torch.no_grad()
    def _mix(self, tile: slice) -> None:
        for k, weights in enumerate(self._weights[:, tile]):
            self._add(self._logits[k].rows(self._index[tile]), weights, first=k == 0)

    def _add(self, logits: Tensor, weights: Tensor, *, first: bool) -> None:
        """One teacher's share; a function of its own, so that nothing of it is left when the next one is read."""
        spec = self._row.spec
        temperature, _ = spec.temperature(self._row.match.options)
        assert spec.teacher_term is not None
        if first:
            self._mixed, self._constant = torch.zeros_like(logits), torch.zeros_like(weights)
        for part in chunks(len(logits), logits):
            scaled = logits[part] if temperature == 1 else logits[part] / temperature
            probs = torch.softmax(scaled, -1)  # cheaper than exp of the other on a CPU
            self._constant[part] += weights[part] * spec.teacher_term(torch.log_softmax(scaled, -1), probs)
            self._mixed[part].addcmul_(probs, weights[part, None])


def ensemble_losses(
    row: Row, student: Tensor, teachers: Sequence[Tensor | SparseRows], weights: Tensor, mask: Tensor | None
) -> Tensor:
    """Per-position loss of one logits row over all teachers.

    Args:
        student: [m,V]. teachers: T of [m,V], or sparse: then completed by the student. weights: [T,m]. mask: [m], or
            None when every position counts.
    Returns:
        [m]. ``losses``: ``sum_k w_k l(s, t_k)``. ``probabilities`` and ``logits``: ``(sum_k w_k) l(s, mixture)``, the
        mixture arithmetic (of softmax at the row's temperature) or geometric (of logits), with weights of sum 1.
    """
    if not row.match.weighted:
        weights = torch.ones_like(weights)
    spec, options, ensemble = row.spec, row.match.options, row.match.ensemble
    pairs = [completed(row, student, teacher) for teacher in teachers]
    wholes = [whole for whole, _ in pairs]
    if len(teachers) == 1:
        return weights[0] * spec(student, wholes[0], mask, pairs[0][1])
    if ensemble == "losses" and spec.mixes(options):
        assert spec.teacher_term is not None
        mixed, constant = _mixture(spec.teacher_term, wholes, weights, mask, spec.temperature(options)[0])
        return _soft_target_losses(spec, student, mixed, constant, mask, options)
    if ensemble == "losses":
        losses = [w * spec(student, t, mask, own) for w, (t, own) in zip(weights, pairs, strict=True)]
        return torch.stack(losses).sum(0)
    total = weights.sum(0)
    shares = weights / total.clamp_min(1e-30)
    if ensemble == "logits":
        mixture = sum(w[:, None] * t for w, t in zip(shares, wholes, strict=True))
    else:
        temperature, _ = spec.temperature(options)
        probs = sum(w[:, None] * torch.softmax(t / temperature, -1) for w, t in zip(shares, wholes, strict=True))
        assert isinstance(probs, Tensor)
        mixture = probs.clamp_min(torch.finfo(probs.dtype).tiny).log() * temperature
    return total * spec(student, mixture, mask, options)


def _soft_target_losses(
    spec: LossSpec,
    student: Tensor,
    mixed: Tensor,
    constant: Tensor,
    mask: Tensor | None,
    options: Mapping[str, object],
) -> Tensor:
    """``T^2 (sum_k w_k c(p_k) - <sum_k w_k p_k, log p_S>)``, [m]: the student is read once for any T.

    Args: mixed, constant: the two sums over the teachers, [m,V] and [m].
    """
    temperature, factor = spec.temperature(options)
    log_student = _log_probs(student, mask, temperature)
    values = factor * (constant - (mixed * log_student).sum(-1))
    return values if mask is None else values.masked_fill(~mask, 0)


def _mixture(
    teacher_term: Callable[[Tensor, Tensor], Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    mask: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """``sum_k w_k p_k`` [m,V] and ``sum_k w_k c(p_k)`` [m]: each teacher's logits are read by one softmax."""
    learned = weights.requires_grad and torch.is_grad_enabled()
    mixed = torch.zeros_like(teachers[0], dtype=torch.float32)
    constant = mixed.new_zeros(len(mixed))
    for weight, teacher in zip(weights, teachers, strict=True):
        log_probs = _log_probs(teacher, mask, temperature)
        probs = log_probs.exp()
        constant = constant + weight * teacher_term(log_probs, probs)
        if learned:  # the weights' gradients need every teacher's own probabilities
            mixed = mixed + weight[:, None] * probs
        else:
            mixed.addcmul_(probs, weight[:, None])
    return mixed, constant


def _log_probs(logits: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    return log_distribution(_keep(logits, mask), temperature)


def _keep(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with 0 in the rows that do not count."""
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0)


def as_logits(value: Tensor | Logits) -> Logits:
    """Logits as the protocol: a tensor [..., C] exists already."""
    return DenseLogits(value) if isinstance(value, Tensor) else value
