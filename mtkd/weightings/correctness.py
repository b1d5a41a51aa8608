"""Weights from each teacher's errors: how well it predicts the labels."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import among, weighting
from mtkd.weightings.traits import Traits


@weighting("mt_bert", sums_to_one=False, needs_labels=True, reads=("ce",))
class MTBert(Weighting):
    """``w_k = 1 / (1 + CE(y, t_k))``: a teacher counts less where it is wrong.

    The paper does not normalise; ``normalise: true`` divides by the sum over teachers. One teacher alone then has
    weight 1, whereas unnormalised it keeps its factor. The paper has no T^2 either: see the method `mt_bert`.

    Source: Wu et al. 2021, One Teacher is Enough? / MT-BERT, arXiv 2106.01023, equation 2.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = self.sums_to_one = normalise

    def forward(self, traits: Traits) -> Tensor:
        weights = 1 / (1 + traits.ce)
        return weights / weights.sum(0) if self.normalise else weights


@weighting("ca_mkd", needs_labels=True, reads=among("ce"))
class CAMKD(Weighting):
    """``w_k = (1 - softmax_k(CE(y, t_k))) / (T - 1)``: sharper than mt_bert, sums to 1; T = 1 gives 1.

    Two teachers: exactly ``softmax(-CE)``. The authors' code divides the weighted sum of losses by T once more; paper
    and this do not, so that equal teachers count as one. Multiply the row's weight by 1/T for the code's number.

    Source: Zhang et al. 2022, Confidence-Aware Multi-Teacher Knowledge Distillation, arXiv 2201.00007, equation 3.
    """

    def forward(self, traits: Traits) -> Tensor:
        if traits.num_teachers == 1:
            return traits.full(1.0)
        return (1 - torch.softmax(traits.ce, 0)) / (traits.num_teachers - 1)
