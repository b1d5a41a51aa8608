"""Weights from how well each teacher predicts the labels."""

from __future__ import annotations

from torch import Tensor

from mtkd.registry import weighting
from mtkd.weightings.base import Weighting
from mtkd.weightings.traits import Traits


@weighting("mt_bert", sums_to_one=False, needs_labels=True)
class MTBert(Weighting):
    """``w_k = 1 / (1 + CE(y, t_k))``: a teacher counts less where it is wrong.

    The paper does not normalise; ``normalise: true`` divides by the sum over teachers. One teacher alone then has
    weight 1, whereas unnormalised it keeps its factor.

    Source: Wu et al. 2021, One Teacher is Enough? / MT-BERT, arXiv 2106.01023, equation 2.
    """

    def __init__(self, normalise: bool = False) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, traits: Traits) -> Tensor:
        weights = 1 / (1 + traits.ce)
        return weights / weights.sum(0) if self.normalise else weights
