"""Weightings that were tried: plug-ins of the proofs' runs."""

from __future__ import annotations

import torch
from torch import Tensor

import mtkd


@mtkd.weighting("sharp_entropy", reads=("entropy",))
class SharpEntropy(mtkd.Weighting):
    """``w = softmax_k(-H_k / tau)`` with H_k the entropy of teacher k's distribution. `tau` in nats."""

    def __init__(self, tau: float = 0.3) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, traits: mtkd.Traits) -> Tensor:
        return torch.softmax(-traits.entropy / self.tau, 0)
