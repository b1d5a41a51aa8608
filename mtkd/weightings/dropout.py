"""Teachers left out at random, step by step."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtkd.data.device import moved
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.draws import uniform_of
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits


@weighting("drop", reads=())
class Drop(Weighting):
    """``w_k = 1/n`` for the n teachers that stay in this optimizer step, 0 for `count` others, drawn uniformly.

    At least one stays: ``n = max(T - count, 1)``, so a chain's first rung, with one teacher, keeps it. Which ones go is
    a pure function of the stage's seed, the step and the teachers' names: the same for every micro-batch and rank, and
    after a resume. The paper sums the losses of the teachers that stay; multiply the row's weight by n for that.

    Source: Son et al. 2021, Densely Guided Knowledge Distillation using Multiple Teacher Assistants, arXiv 2009.08825,
    the part on stochastic learning with teacher dropping.
    """

    def __init__(self, facts: StageFacts, count: int = 1) -> None:
        super().__init__()
        if count < 0:
            raise ValueError(f"count must not be negative; found {count}")
        self._names, self._seed = facts.teachers, facts.seed
        self._stay = max(len(facts.teachers) - count, 1)

    def forward(self, traits: Traits) -> Tensor:
        draws = uniform_of(self._names, self._seed, traits.around.step)[:, 0]
        weights = torch.zeros(traits.num_teachers)
        weights[np.argsort(draws)[: self._stay].tolist()] = 1 / self._stay
        return moved(weights, traits.mask.device)[:, None, None].expand(traits.shape)
