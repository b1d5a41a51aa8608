"""One micro-batch of token ids, the same for every task, model and engine."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

NO_LABEL = -100
"""A target with this id is not a target (the convention of torch's cross entropy)."""


@dataclass
class Batch:
    """Token ids and what is asked of them.

    Attributes:
        ids: example numbers in the split, [B] int64; -1 for a filler row (all of its masks are empty).
        input_ids: [B,L] int64.
        attention_mask: [B,L] bool, True at real tokens. Filler rows keep one True so that attention stays finite.
        targets: token tasks: [B,L] int64, the id that position l must predict, `NO_LABEL` where nothing is asked
            (already shifted for causal models); classification: [B] int64; regression: [B] float32.
        token_type_ids: [B,L] int64 or None.
        nsp_targets: 0 where the second segment follows the first, 1 where it is another document's, `NO_LABEL` in
            filler rows; [B] int64, or None when nothing is asked.
        routes: number of the teacher that the data names for each example, [B] int64 (-1 in filler rows), or None.
        position_ids: where examples bring their own, GLM's: row 0 index in part A, or of the blank that a piece fills;
            row 1 0 in part A, 1, 2, ... in a piece; [B,2,L] int64, 0 at padding. None: tokens are counted.
        sep: tokens of part A, which is seen in both directions, [B] int64; None where there are no parts.
    """

    ids: Tensor  # [B]
    input_ids: Tensor  # [B,L]
    attention_mask: Tensor  # [B,L]
    targets: Tensor  # [B,L] or [B]
    token_type_ids: Tensor | None = None  # [B,L]
    nsp_targets: Tensor | None = None  # [B]
    routes: Tensor | None = None  # [B]
    position_ids: Tensor | None = None  # [B,2,L]
    sep: Tensor | None = None  # [B]

    @property
    def real(self) -> Tensor:
        """Rows that count, [B] bool."""
        return self.ids >= 0

    @property
    def token_mask(self) -> Tensor:
        """Unpadded tokens of rows that count, [B,L] bool."""
        return self.attention_mask & self.real[:, None]

    @property
    def target_mask(self) -> Tensor:
        """Positions (or rows) with a target, shaped like `targets`, bool."""
        if self.targets.is_floating_point():
            return self.real & ~self.targets.isnan()
        has = self.targets != NO_LABEL
        return has & (self.real[:, None] if self.targets.dim() == 2 else self.real)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        moved: dict[str, Any] = {k: None if v is None else v.to(device, non_blocking=True) for k, v in values.items()}
        return Batch(**moved)


def position_counts(batches: list[Batch]) -> dict[str, int]:
    """Valid positions of every kind over some micro-batches: `tokens`, `targets`, `sequences`."""
    return {
        "tokens": sum(int(b.token_mask.sum()) for b in batches),
        "targets": sum(int(b.target_mask.sum()) for b in batches),
        "sequences": sum(int(b.real.sum()) for b in batches),
    }
