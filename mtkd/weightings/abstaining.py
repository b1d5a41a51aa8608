"""Weights of specialists by their output "other", which is trained on examples of no class of theirs."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits


@weighting("abstain", reads=("own_mass",))
class Abstain(Weighting):
    """``w_k = (1 - p_k(other | x))^power / sum_j (1 - p_j(other | x))^power``: who does not know an example is silent.

    p_k is over all outputs of teacher k; everything else reads the softmax without "other". No labels are needed.

    Args:
        power: 1 is the formula; above it weights are sharper, towards the one teacher that claims the example.
        floor: smallest ``1 - p(other)`` that counts, a probability. Where all teachers are below it, an example that
            is of no teacher's classes, the weights are uniform. With `odds` it bounds ``p(other)`` too.
        odds: weigh by ``(1 - p_k(other)) / p_k(other)``: if every example is of the classes of exactly one teacher and
            the teachers judge independently, the probability that it is teacher k's is in proportion to
            ``(1 - p_k(other)) prod_{j != k} p_j(other)``, and that to the odds. The others' denials then count too, so
            that a specialist that saw few examples of "other", and claims too much, is overruled.

    A teacher without an output "other" claims every example. Raises ValueError for a power that is not positive and a
    floor outside (0, 1]. Source: ours; the output is that of open-set recognition (background class) as in Dhamija et
    al. 2018, Reducing Network Agnostophobia, arXiv 1811.04110.
    """

    per_token = False

    def __init__(self, power: float = 1.0, floor: float = 1e-6, odds: bool = False) -> None:
        super().__init__()
        if power <= 0:
            raise ValueError(f"power must be positive; found {power}")
        if not 0 < floor <= 1:
            raise ValueError(f"floor is a probability above 0, at most 1; found {floor}")
        self.power, self.floor, self.odds = power, floor, odds

    def forward(self, traits: Traits) -> Tensor:
        claims = traits.own_mass.clamp_min(self.floor).log()  # [T,B,1]
        if self.odds:
            claims = claims - (1 - traits.own_mass).clamp_min(self.floor).log()
        return torch.softmax(self.power * claims, 0)
