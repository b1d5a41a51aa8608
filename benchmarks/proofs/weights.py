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


@mtkd.trait
def energy(logits: Tensor, labels: Tensor | None) -> Tensor:
    """Logarithm of the sum of exponentials of a teacher's logits: large where it knows the text (Liu et al. 2020)."""
    return logits.logsumexp(-1)


@mtkd.weighting("energy", reads=("energy",))
class Energy(mtkd.Weighting):
    """``w = softmax_k(E_k / tau)`` with E_k the log-sum-exp of teacher k's logits. `tau` in nats."""

    def __init__(self, tau: float = 0.5) -> None:
        super().__init__()
        self.tau = tau

    def forward(self, traits: mtkd.Traits) -> Tensor:
        return torch.softmax(traits.read("energy") / self.tau, 0)
