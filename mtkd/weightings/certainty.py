"""Weights from each teacher's own certainty: no labels needed, usable on unlabelled and generated data."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import among, weighting
from mtkd.weightings.traits import Traits


class _Softmax(Weighting):
    """``softmax_k(trait_k / tau)``."""

    trait: str

    def __init__(self, tau: float = 0.1) -> None:
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be positive; found {tau}")
        self.tau = tau

    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(traits.read(self.trait) / self.tau, 0)


@weighting("confidence", reads=("confidence",))
class Confidence(_Softmax):
    """``w = softmax_k(c_k / tau)`` with c_k the teacher's largest probability. `tau` in units of probability.

    Source: common practice; the soft form of choosing the most confident teacher (Du et al. 2020, NeurIPS, section 3
    discusses why confidence alone may mislead).
    """

    trait = "confidence"


@weighting("margin", reads=("margin",))
class Margin(_Softmax):
    """``w = softmax_k(m_k / tau)`` with m_k the difference of teacher k's two largest probabilities.

    A teacher torn between two classes counts little, however large its first probability is. `tau` in units of
    probability.

    Source: the margin of Scheffer et al. 2001, Active Hidden Markov Models for Information Extraction, as a softmax.
    """

    trait = "margin"


@weighting("energy", reads=("energy",))
class Energy(_Softmax):
    """``w = softmax_k(e_k / tau)`` with e_k the log of the sum of exp of teacher k's logits: who knows such examples.

    A softmax forgets how large the logits were, this does not: a specialist's are small on what it never saw. That
    holds for teachers of one recipe. A constant added to all logits of one teacher changes its weight and none of its
    predictions, so compare teachers that were trained alike. `tau` in nats.

    Source: Liu, Wang, Owens, Li 2020, Energy-based Out-of-distribution Detection, arXiv 2010.03759, equation 3 at
    temperature 1; as weights of several teachers ours.
    """

    trait = "energy"

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__(tau)


@weighting("entropy", reads=among("entropy"))
class Entropy(Weighting):
    """``w_k = (1 - H_k / sum_j H_j) / (T - 1)``: the surer a teacher, the more it counts; T = 1 gives 1.

    When every teacher is certain (all entropies 0) the weights are uniform. Public code (that of CA-MKD's authors) does
    not normalise the weights, which then sum to T - 1, and divides the weighted sum of losses by T: in all (T - 1)/T of
    what is here. Multiply the row's weight by that for the code's number.

    Source: Kwon et al. 2020, Adaptive Knowledge Distillation Based on Entropy (EBKD), ICASSP, equation 4.
    """

    def forward(self, traits: Traits) -> Tensor:
        if traits.num_teachers == 1:
            return traits.full(1.0)
        entropy = traits.entropy
        total = entropy.sum(0)
        # No lower bound on the sum but 0: very sure teachers have entropies below 1e-30 that still compare.
        share = torch.where(total > 0, entropy / total.masked_fill(total == 0, 1), 1 / traits.num_teachers)
        return (1 - share) / (traits.num_teachers - 1)
