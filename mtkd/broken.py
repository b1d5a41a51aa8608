"""What a broken law raises, and how far two tensors may be apart."""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = 1e-5
"""Of float32 values near 1: some 160 roundings of 2**-24, more than any case has operations on one number."""


class LawBroken(AssertionError):
    """A loss or weighting does not keep a law.

    Attributes:
        law: the law's name, e.g. "padding". name: of the loss or weighting. found: what was found instead.
    """

    def __init__(self, law: str, name: str, found: str) -> None:
        super().__init__(f"'{name}' breaks the law '{law}': {found}")
        self.law, self.name, self.found = law, name, found


def difference(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest entry wanted; infinite where not a number."""
    if wanted.numel() == 0:
        return 0.0
    gap = (found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30)
    return float(gap.nan_to_num(torch.inf))
