"""What GLM's layers attend to, and where its tokens stand: prefix masks and two-row positions.

Part A (the text with its blanks) sees itself in both directions; part B (the pieces that fill them) sees part A and
what stands before it. `sep`, the number of part-A tokens, says all of that: M[i,j] = 1 where j <= i or j < sep.

Source: Du et al. 2022, GLM, arXiv 2103.10360, sections 2.1 and 2.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sep = int | Tensor | None


def split_mask(attention_mask: int | Tensor | None, sep: Sep) -> tuple[Tensor | None, Sep]:
    """Tell a mask [B,K] or [B,1,Q,K] from a `sep` that stands in its place, as users of the original give it.

    Raises:
        ValueError: two different things both called `sep`, or a mask of another shape.
    """
    if attention_mask is None:
        return None, sep
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() < 2:
        if sep is not None:
            raise ValueError("attention_mask of fewer than two dimensions is `sep`, which is given a second time")
        return None, attention_mask
    if attention_mask.dim() not in (2, 4):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: allowed are a number or [B] (the length of part "
            "A), [B,L] (1 = a token, 0 = padding) and [B,1,L,L] (1 = attend)"
        )
    if attention_mask.dim() == 4 and sep is not None:
        raise ValueError("a mask of four dimensions says all; drop `sep`")
    return attention_mask, sep


def prefix_mask(
    attention_mask: Tensor | None, sep: Sep, *, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Which keys a query sees, bool [B or 1,1,Q,K]; None for a plain triangle, which needs no mask.

    The Q queries are the last of the K keys. `sep` counts tokens, not columns: with padding on the left, part A is the
    first `sep` columns that are not padding. A query that would see nothing (padding) sees itself.

    Args:
        attention_mask, sep: as `split_mask` returns them; no `sep` is a `sep` of 0.

    Raises:
        ValueError: a mask that does not fit the keys, or a `sep` that does not fit the batch.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return _whole_mask(attention_mask, queries, keys).to(device)
    if attention_mask is None and (queries == 1 or (sep is None and queries == keys)):
        return None
    column = torch.arange(keys, device=device)
    seen = column <= column[keys - queries :, None]  # [Q,K]
    if attention_mask is None:
        part_a = _per_row(sep, batch, device)[:, None] > column
        return (seen | part_a[:, None])[:, None]
    if attention_mask.shape != (batch, keys):
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: allowed is [{batch},{keys}], with what is cached"
        )
    real = attention_mask.to(device) != 0
    number = real.long().cumsum(1) - 1  # of a token among those of its row
    part_a = number < _per_row(sep, batch, device)[:, None]
    seen = (seen | part_a[:, None]) & real[:, None]
    itself = column == column[keys - queries :, None]
    return (seen | (~seen.any(-1, keepdim=True) & itself))[:, None]


def _whole_mask(mask: Tensor, queries: int, keys: int) -> Tensor:
    if mask.shape[1] != 1 or mask.shape[2] not in (queries, keys) or mask.shape[3] != keys:
        raise ValueError(f"attention_mask has shape {list(mask.shape)}: allowed is [B,1,{queries},{keys}]")
    mask = mask[:, :, -queries:]
    if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask holds other numbers than 0 and 1: an additive mask is not one of GLM's forms")
    seen = mask != 0
    itself = torch.arange(keys, device=mask.device) == torch.arange(keys - queries, keys, device=mask.device)[:, None]
    return seen | (~seen.any(-1, keepdim=True) & itself)


def _per_row(sep: Sep, batch: int, device: torch.device) -> Tensor:
    """`sep` as [B] int64."""
    if sep is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    if not isinstance(sep, Tensor):
        return torch.full((batch,), int(sep), dtype=torch.int64, device=device)
    if sep.dtype.is_floating_point or sep.dtype == torch.bool or sep.shape not in ((), (1,), (batch,)):
        raise ValueError(
            f"the length of part A has shape {list(sep.shape)}, {sep.dtype}: allowed are integers, one or [{batch}]"
        )
    return sep.to(device=device, dtype=torch.int64).expand(batch)


def two_rows(position_ids: Tensor) -> Tensor:
    """Positions [B,2,L]; from one row [B,L] of them, all of part A.

    Raises:
        ValueError: positions of another shape.
    """
    if position_ids.dim() == 2:
        return torch.stack([position_ids, torch.zeros_like(position_ids)], 1)
    if position_ids.dim() != 3 or position_ids.shape[1] != 2:
        raise ValueError(f"position_ids have shape {list(position_ids.shape)}: allowed are [B,2,L] and [B,L]")
    return position_ids


def check_positions(position_ids: Tensor, most: int) -> None:
    """Refuse positions beyond the tables; on a GPU the lookup itself does, and asking first would wait for it.

    Args:
        most: the largest position, `max_position_embeddings`.

    Raises:
        ValueError: naming the position.
    """
    if position_ids.device.type != "cpu" or not position_ids.numel() or torch.compiler.is_compiling():
        return
    smallest, largest = (int(x) for x in torch.aminmax(position_ids))
    if smallest < 0 or largest > most:
        position = smallest if smallest < 0 else largest
        raise ValueError(f"position {position} of a GLM whose positions are 0 to {most}: the text is too long for it")


def default_positions(attention_mask: Tensor | None, *, queries: int, keys: int, device: torch.device) -> Tensor:
    """Tokens counted from 0, padding (of a mask [B,K]) not counted; all of part A. [B or 1,2,Q]."""
    if attention_mask is not None and attention_mask.dim() == 2:
        first = ((attention_mask.to(device) != 0).long().cumsum(1) - 1).clamp_min(0)
    else:
        first = torch.arange(keys, device=device)[None]
    return two_rows(first[:, -queries:])


def next_positions(position_ids: Tensor, number: int) -> Tensor:
    """Positions [B,2,n] of the next n tokens: inside a piece pos2 grows and pos1 stays; in part A pos1 grows."""
    last = position_ids[:, :, -1:]
    steps = torch.arange(1, number + 1, device=last.device)
    inside = last[:, 1] > 0
    return torch.stack([last[:, 0] + steps * ~inside, last[:, 1] + steps * inside], 1)
