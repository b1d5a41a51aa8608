"""Packing: the real tokens of several examples share the rows that a decoder runs on, each example for itself.

A batch keeps its B examples of L padded positions. Only what the model multiplies changes: examples are laid side by
side in R rows of C columns (first fit, longest first), positions start at 0 in each, a token attends to its own
example alone, and what comes out is put back where the example is in the batch, zeros at its padding. Losses, weights
and caches never see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mtkd.data.device import moved
from mtkd.models.attention import AttentionCall

_STRETCHES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Row lengths that are tried, in lengths of the longest example: longer rows fill better and attend to more."""

_LINEAR_WORK = 6
"""Products per token and layer: 24 H^2 in the linear layers, 4 C H in attention over C columns; so 6 H + C."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a padded batch lie in packed rows.

    Attributes:
        attention_mask: of the batch, [B,L] bool.
        rows, columns: R and C of the packed rows.
        places: flat positions b*L + l of the n real tokens, [n] int64.
        slots: their flat positions r*C + c in the packed rows, [n] int64.
        position_ids: positions within each example, 0 in free slots, [R,C] int64.
        mask: which tokens a token attends to: those of its example up to itself; [R,1,C,C] bool.
    """

    attention_mask: Tensor
    rows: int
    columns: int
    places: Tensor
    slots: Tensor
    position_ids: Tensor
    mask: Tensor

    def pack(self, padded: Tensor) -> Tensor:
        """[B,L] -> [R,C], zeros in free slots."""
        flat = padded.new_zeros(self.rows * self.columns)
        return flat.index_copy(0, self.slots, padded.reshape(-1)[self.places]).view(self.rows, self.columns)

    def spread(self, packed: Tensor) -> Tensor:
        """[R,C,...] -> [B,L,...], zeros at padding; differentiable."""
        rest = packed.shape[2:]
        values = packed.reshape(-1, *rest).index_select(0, self.slots)
        flat = values.new_zeros(self.attention_mask.numel(), *rest)
        return flat.index_copy(0, self.places, values).view(*self.attention_mask.shape, *rest)

    def spread_call(self, call: AttentionCall) -> AttentionCall:
        """The operands of a layer's attention, [R,A,C,D] -> [B,A,L,D], as if the rows had not been packed."""
        query, key, value = (
            self.spread(operand.transpose(1, 2)).transpose(1, 2) for operand in (call.query, call.key, call.value)
        )
        before = _triangle(self.attention_mask.shape[1], self.attention_mask.device)
        return replace(call, query=query, key=key, value=value, mask=before & self.attention_mask[:, None, None, :])


def make_layout(
    attention_mask: Tensor, width: int, columns: int | None = None, on_host: Tensor | None = None
) -> Layout | None:
    """The cheapest packing of a batch for a model of some width; None where padded rows are as cheap.

    Args:
        attention_mask: [B,L] bool.
        width: H of the model.
        columns: length of the rows, at least the longest example; default: what costs least.
        on_host: the same mask where reading it waits for no device.
    """
    on_host = attention_mask.cpu() if on_host is None else on_host
    lengths = on_host.sum(1).tolist()
    chosen = _cheapest(lengths, attention_mask.shape[1], width) if columns is None else first_fit(lengths, columns)
    if chosen is None:
        return None
    num_columns = max(sum(lengths[e] for e in row) for row in chosen)
    starts = [0] * len(lengths)
    example_of_slot = torch.full((len(chosen), num_columns), -1, dtype=torch.int64)
    for r, row in enumerate(chosen):
        begin = 0
        for example in row:
            starts[example] = r * num_columns + begin
            example_of_slot[r, begin : begin + lengths[example]] = example
            begin += lengths[example]
    device = attention_mask.device
    owner = moved(example_of_slot, device)
    within = on_host.long().cumsum(1) - 1  # [B,L]: the position of each real token in its example
    places = on_host.reshape(-1).nonzero().squeeze(-1)
    slots = (within + torch.tensor(starts)[:, None]).reshape(-1)[places]
    position_ids = torch.zeros(len(chosen) * num_columns, dtype=torch.int64)
    position_ids = position_ids.index_copy(0, slots, within.reshape(-1)[places]).view(len(chosen), num_columns)
    places, slots, position_ids = moved(places, device), moved(slots, device), moved(position_ids, device)
    same = owner[:, :, None] == owner[:, None, :]  # free slots attend to one another; they are never read
    mask = (same & _triangle(num_columns, device))[:, None]
    return Layout(attention_mask, len(chosen), num_columns, places, slots, position_ids, mask)


def _triangle(size: int, device: torch.device) -> Tensor:
    """True where a column is not after the row, [size,size]."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril()


def first_fit(lengths: Sequence[int], columns: int) -> list[list[int]]:
    """Examples per row, at most `columns` tokens each: the longest example first, into the first row that has room.

    Source: Johnson 1973, Near-optimal bin packing algorithms (first-fit decreasing): at most 11/9 of the fewest rows.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(range(len(lengths)), key=lambda e: -lengths[e]):
        need = lengths[example]
        row = next((r for r, free in enumerate(room) if free >= need), None)
        if row is None:
            rows.append([])
            room.append(columns)
            row = len(rows) - 1
        rows[row].append(example)
        room[row] -= need
    return rows


def _cheapest(lengths: Sequence[int], padded: int, width: int) -> list[list[int]] | None:
    """The packing that needs the fewest products, or None when padding needs no more."""
    longest, total = max(lengths), sum(lengths)
    best: list[list[int]] | None = None
    least = len(lengths) * padded * (_LINEAR_WORK * width + padded)
    for stretch in _STRETCHES:
        columns = int(longest * stretch)
        rows = first_fit(lengths, columns)
        filled = max(sum(lengths[e] for e in row) for row in rows)
        cost = len(rows) * filled * (_LINEAR_WORK * width + filled)
        if cost < least:
            best, least = rows, cost
        if columns >= total:
            break
    return best
