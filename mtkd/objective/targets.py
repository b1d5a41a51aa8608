"""Targets: the other side of a logits row, one tile of positions at a time.

`passes_for` decides once per step who is read when; the tile function then only adds up. A step has one pass over the
tiles, or one per teacher where teachers do not have to meet: memory then holds one teacher's tile of logits and not T.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.models.features import Logits, SparseLogits, SparseRows
from mtkd.models.pieces import Pieces
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses, soft_target_losses
from mtkd.objective.kept import check_known, read
from mtkd.objective.onepass import ReadOnce
from mtkd.objective.teachable import teachable

Where = tuple[Tensor | None, Tensor, Tensor | None]
"""(where a row counts or None, its labels, their log-probabilities when they were written or None), [n] each."""


@dataclass(frozen=True)
class Positions:
    """The positions of a micro-batch that logits rows read.

    Attributes:
        everywhere: positions without a target are among them.
    """

    index: Tensor  # [n], flat positions
    labels: Tensor  # [n], the data's targets there; `NO_LABEL` elsewhere, where the student wrote too
    has_label: Tensor  # [n] bool, where there is a target, of the data or of the student
    everywhere: bool
    by_data: Tensor | None = None  # [n] bool, where the data gave the target; None: where there is one
    written: Tensor | None = None  # [n], what the student wrote there, `NO_LABEL` elsewhere; None: nowhere
    behaviour: Tensor | None = None  # [n], log-probability of that when it was written, nats

    def mask(self, row: Row, token_level: bool) -> Tensor | None:
        """Where a row counts, [n] bool; None where it counts at all of them."""
        kind = row.counted(token_level)
        if kind == "written":
            return torch.zeros_like(self.has_label) if self.written is None else self.written != NO_LABEL
        if kind == "labels" and self.by_data is not None:
            return self.by_data
        return self.has_label if self.everywhere and kind in ("targets", "labels") else None

    def read_by(self, row: Row, token_level: bool) -> Where:
        """What a row reads here."""
        mask = self.mask(row, token_level)
        if "behaviour" in row.spec.needs:
            return mask, self.labels if self.written is None else self.written, self.behaviour
        return mask, self.labels, None


def positions_of(rows: Sequence[Row], batch: Batch, token_level: bool) -> Positions:
    """The positions that these rows read: of targets alone, of every token, or of every example."""
    # Without a row over all positions, prompts and padding never reach the head: most of a batch of instructions.
    everywhere = not token_level or any(row.match.positions == "all" for row in rows)

    def read(of: Batch) -> Tensor:
        every = of.token_mask if token_level else of.real  # [B,L] or [B]
        return every if everywhere else of.target_mask

    index = batch.where(read)  # [n]
    labels, has_label = batch.labelled().targets.reshape(-1)[index], batch.target_mask.reshape(-1)[index]
    by_data = None if batch.written is None else batch.label_mask.reshape(-1)[index]
    if batch.written is None or by_data is None:
        return Positions(index, labels, has_label, everywhere)
    written = batch.targets.reshape(-1)[index].masked_fill(by_data | ~has_label, NO_LABEL)
    behaviour = None if batch.behaviour is None else batch.behaviour.reshape(-1)[index]
    return Positions(index, labels, has_label, everywhere, by_data, written, behaviour)


@dataclass
class Tile:
    """One tile of the student, as every row of a pass reads it.

    Attributes:
        at: its place among the n positions.
        shared: what several rows read off the student, by its maker; it lives as long as the tile.
    """

    student: Tensor  # [m,V], its logits
    weights: Tensor  # [T,m], of the teachers
    at: slice
    shared: dict[Hashable, Any] = field(default_factory=dict)


class Targets(Protocol):
    """The other side of one logits row."""

    def losses(self, tile: Tile) -> Tensor:
        """The row's loss at the tile's positions over all teachers that it reads, [m]."""
        ...


class Labels:
    """The labels.

    Args:
        mask: where the row counts, [n], or None.
    """

    def __init__(self, row: Row, labels: Tensor, mask: Tensor | None) -> None:
        self._row, self._labels, self._mask = row, labels, mask

    def losses(self, tile: Tile) -> Tensor:
        return self._row.spec(tile.student, self._labels[tile.at], _part(self._mask, tile), self._row.match.options)


class Together:
    """Several teachers at the same time.

    Args:
        teachers: shared by the rows of a step.
        members: numbers of the teachers that are read.
        where: the row counts, and the words that its loss needs.
    """

    def __init__(self, row: Row, teachers: TeacherTiles, members: Sequence[int], where: Where) -> None:
        self._row, self._teachers, self._members = row, teachers, list(members)
        self._where = where

    def losses(self, tile: Tile) -> Tensor:
        rows = self._teachers(tile.at)
        members = [rows[k] for k in self._members]
        # Not indexed with the list: that is moved to the device, and waited for.
        weights = torch.stack([tile.weights[k] for k in self._members])
        return ensemble_losses(self._row, tile.student, members, weights, *_parts(self._where, tile))


class Alone:
    """One teacher, whose tile of logits is the only one that exists."""

    def __init__(self, row: Row, teachers: TeacherTiles, number: int, where: Where) -> None:
        self._row, self._teachers, self._number = row, teachers, number
        self._where = where

    def losses(self, tile: Tile) -> Tensor:
        rows, weights = self._teachers(tile.at, only=self._number), tile.weights[self._number, None]
        return ensemble_losses(self._row, tile.student, rows, weights, *_parts(self._where, tile))


class Selected:
    """Several teachers at the same time, at the positions that they and the student select; 0 elsewhere."""

    def __init__(self, row: Row, teachers: TeacherTiles, members: Sequence[int], where: Where) -> None:
        self._inner, self._row, self._teachers, self._mask = (
            Together(row, teachers, members, where),
            row,
            teachers,
            where[0],
        )

    def losses(self, tile: Tile) -> Tensor:
        return self._inner.losses(tile).masked_fill(~self.selection(tile), 0)

    def selection(self, tile: Tile) -> Tensor:
        """The selected positions among those that count, [m] bool."""
        if self not in tile.shared:
            chosen = teachable(self._row, tile.student, self._teachers(tile.at), tile.weights)
            mask = _part(self._mask, tile)
            tile.shared[self] = chosen if mask is None else chosen & mask
        selection: Tensor = tile.shared[self]
        return selection


class Share:
    """1 where a position is selected: the mean is logged, and is no part of the loss."""

    def __init__(self, selected: Selected) -> None:
        self._selected = selected

    def losses(self, tile: Tile) -> Tensor:
        return self._selected.selection(tile).float()


class Kept:
    """Cached teachers, compared at the columns that they keep; the label row may share their pass.

    Args:
        rest: the teachers that are not cached, or None.
    """

    def __init__(self, row: Row, once: ReadOnce, rest: Together | None) -> None:
        self._row, self._once, self._rest = row, once, rest

    def losses(self, tile: Tile) -> Tensor:
        if self._once not in tile.shared:
            tile.shared[self._once] = self._once.at(tile.student, tile.at)
        losses: Tensor = tile.shared[self._once].losses(self._row, tile.weights)
        return losses if self._rest is None else losses + self._rest.losses(tile)


class Mixture:
    """The weighted teachers of a row of soft targets as one distribution, a tile at a time.

    The teachers take turns: memory holds one teacher's tile and the mixture's, for any number of teachers.

    Args:
        row: of several teachers, with a loss that `mixes`.
        logits: one per teacher, none of a cache.
        index: flat positions, [n].
        weights: at these positions, [T,n]; constants.
        size: positions per tile.
    """

    def __init__(
        self, row: Row, logits: Sequence[Logits], index: Tensor, weights: Tensor, size: int, pieces: Pieces
    ) -> None:
        self._row, self._logits, self._index, self._size, self._pieces = row, logits, index, size, pieces
        self._weights = weights.detach() if row.match.weighted else torch.ones_like(weights)
        self._start = -1
        self._mixed, self._constant = torch.empty(0), torch.empty(0)

    def losses(self, tile: Tile) -> Tensor:
        start = tile.at.start - tile.at.start % self._size
        if start != self._start:
            self._mixed = self._constant = torch.empty(0)  # the old mixture is freed before there is a new one
            self._start = start
            self._mix(slice(start, min(start + self._size, len(self._index))))
        inside = slice(tile.at.start - start, tile.at.stop - start)
        spec, options = self._row.spec, self._row.match.options
        return soft_target_losses(spec, tile.student, self._mixed[inside], self._constant[inside], None, options)

    @torch.no_grad()
    def _mix(self, whole: slice) -> None:
        for k, weights in enumerate(self._weights[:, whole]):
            self._add(self._logits[k].rows(self._index[whole]), weights, first=k == 0)

    def _add(self, logits: Tensor, weights: Tensor, *, first: bool) -> None:
        """Add one teacher's share; in a function of its own, so that its tile is freed before the next one exists."""
        spec = self._row.spec
        temperature, _ = spec.temperature(self._row.match.options)
        assert spec.teacher_term is not None
        if first:
            self._mixed, self._constant = torch.zeros_like(logits), torch.zeros_like(weights)  # [m,V], [m]
        for part in self._pieces.chunks(len(logits), logits):
            scaled = logits[part] if temperature == 1 else logits[part] / temperature
            probs = torch.softmax(scaled, -1)  # cheaper than exp of the other on a CPU
            self._constant[part] += weights[part] * spec.teacher_term(torch.log_softmax(scaled, -1), probs)
            self._mixed[part].addcmul_(probs, weights[part, None])


class TeacherTiles:
    """Teachers' logits at slices of the selected positions: computed a tile at a time, read in smaller pieces."""

    def __init__(self, logits: Sequence[Logits], index: Tensor, size: int) -> None:
        self._logits, self._index, self._size = logits, index, size
        self._asked: tuple[int, int | None] = (-1, None)
        self._tiles: list[Tensor | SparseRows] = []

    def __call__(self, at: slice, only: int | None = None) -> list[Tensor | SparseRows]:
        """T of [m,V], or the columns that a cached teacher keeps.

        Args:
            at: within one tile, or everything.
            only: the number of the one teacher that is read; the others' tiles then do not exist.
        """
        size = max(at.stop - at.start, self._size)
        start = at.start - at.start % size
        # Reading a head may be a collective: every rank must read equally often, even one without positions. So an
        # empty tile counts as read, too.
        length = min(at.stop, len(self._index)) - start
        if (start, only) != self._asked or (self._tiles and len(self._tiles[0]) < length):
            self._tiles = []  # the old tile is freed before there is a new one
            asked = self._logits if only is None else [self._logits[only]]
            self._asked = (start, only)
            self._tiles = [read(teacher, self._index[start : start + size]) for teacher in asked]
        return [rows[at.start - start : at.stop - start] for rows in self._tiles]


Member = tuple[int, Row, Targets, int]
"""(number of the value, row, its targets, its global number of positions)."""


@dataclass(frozen=True)
class Pass:
    """One pass over the tiles. Callable as `mtkd.objective.tiles.TileLoss`.

    Attributes:
        num_rows: of the step, and one more per row that selects positions; one that is not a member has the value 0.
    """

    members: tuple[Member, ...]
    num_rows: int

    def __call__(self, student: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        """(weighted sum of the rows' values [], the values [R]) of a tile."""
        tile = Tile(student, weights, at)
        total, values = student.new_zeros(()), student.new_zeros(self.num_rows)
        for number, row, targets, count in self.members:
            # Divided by the global count here, so that tiles, micro-batches and ranks only add up.
            value = targets.losses(tile).sum() / count
            if not isinstance(targets, Share):
                total = total + row.match.weight * value
            values[number] = value.detach()
        return total, values


def passes_for(
    rows: Sequence[Row],
    counts: Sequence[int],
    logits: Sequence[Logits],
    positions: Positions,
    weights: Tensor,
    *,
    token_level: bool,
    size: int,
    pieces: Pieces | None,
) -> list[Pass]:
    """Decide who is compared with the student in which pass.

    The values are those of the rows, then the shares of positions that rows with ``positions: teachable`` select.

    Args:
        rows: all logits rows of the stage.
        counts: their global numbers of positions.
        logits: of the teachers, in pool order.
        weights: of the teachers at the positions, [T,n].
        size: positions per tile.
        pieces: how a tile is cut; None where there are no tiles.
    """
    check_known(rows, logits)
    teachers = TeacherTiles(logits, positions.index, size)
    once = None if positions.everywhere else ReadOnce(rows, logits, positions.index, positions.labels)
    soft = [row for row in rows if not row.from_labels]
    several = len(logits) > 1 and pieces is not None and not any(isinstance(x, SparseLogits) for x in logits)
    # Teachers that need not meet have a pass each. The student's logits of a tile are computed once for all passes.
    apart = several and all(_alone(row) for row in soft) and bool(soft)
    # A mixture made before the student is read has constant weights: learned ones need a gradient through it.
    learned = weights.requires_grad and torch.is_grad_enabled()

    def targets(row: Row, turn: int) -> Targets:
        mask, labels, _ = where = positions.read_by(row, token_level)
        if row.selects:
            return Selected(row, teachers, range(len(logits)), where)
        if once is not None and once.serves(row):
            rest = Together(row, teachers, once.rest, where) if once.rest and not row.from_labels else None
            return Kept(row, once, rest)
        if row.from_labels:
            return Labels(row, labels, mask)
        if apart:
            return Alone(row, teachers, turn, where)
        if pieces and several and len(soft) == 1 and _mixes(row) and mask is None and not learned:
            return Mixture(row, logits, positions.index, weights, size, pieces)
        return Together(row, teachers, range(len(logits)), where)

    values = len(rows) + sum(row.selects for row in rows)
    return [Pass(_members(rows, counts, k, targets), values) for k in range(len(logits) if apart else 1)]


def _members(
    rows: Sequence[Row], counts: Sequence[int], turn: int, targets: Callable[[Row, int], Targets]
) -> tuple[Member, ...]:
    """The rows of a pass, then the share of positions of each that selects some."""
    # The first pass alone compares labels: one per teacher would count them T times.
    numbers = [i for i, row in enumerate(rows) if turn == 0 or not row.from_labels]
    made = [(i, rows[i], targets(rows[i], turn), counts[i]) for i in numbers]
    selected = [(row, each, count) for _, row, each, count in made if isinstance(each, Selected)]
    shares = [(len(rows) + i, row, Share(each), count) for i, (row, each, count) in enumerate(selected)]
    return (*made, *shares)


def _mixes(row: Row) -> bool:
    """The row's teachers may meet in one distribution before the student is read."""
    return row.match.ensemble == "losses" and row.spec.mixes(row.match.options)


def _alone(row: Row) -> bool:
    """The row's loss is a sum over teachers, each compared with the student by itself."""
    return row.match.ensemble == "losses" and not row.spec.mixes(row.match.options) and not row.selects


def _part(mask: Tensor | None, tile: Tile) -> Tensor | None:
    return None if mask is None else mask[tile.at]


def _parts(where: Where, tile: Tile) -> Where:
    mask, labels, behaviour = where
    return _part(mask, tile), labels[tile.at], _part(behaviour, tile)
