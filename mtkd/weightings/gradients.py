"""Weights from the teachers' gradients: the direction that all teachers agree on, as far as they do."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.device import moved
from mtkd.weightings.base import Weighting
from mtkd.weightings.hull import smallest_norm
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits


def has_gradient(row: Match) -> bool:
    """Whether a row is a part of the loss that the teachers' gradients are taken of: weighted, on logits."""
    return row.feature == "logits" and row.target == "teacher" and row.weighted


class _GradientSpace(Weighting):
    """Solves for the step's weights, with the teachers in the order of their names: pool order changes nothing."""

    def __init__(self, teachers: tuple[str, ...], largest: float) -> None:
        super().__init__()
        self._largest = largest
        self._order = sorted(range(len(teachers)), key=teachers.__getitem__)

    def forward(self, traits: Traits) -> Tensor:
        if traits.num_teachers == 1:
            return traits.full(1.0)
        gram = traits.gram.cpu().numpy()[np.ix_(self._order, self._order)]
        weights = np.empty(len(gram))
        weights[self._order] = smallest_norm(gram, self._largest)
        values = moved(torch.tensor(weights, dtype=torch.float32), traits.mask.device)
        return values[:, None, None].expand(traits.shape)


@weighting("ae_kd", reads=("gram",))
class AEKD(_GradientSpace):
    """``argmin_w |sum_k w_k g_k|^2``, ``sum w = 1``, ``0 <= w <= c``: the common descent direction of the teachers.

    g_k is the gradient of teacher k's loss (the stage's weighted rows on logits) with respect to the student's logits,
    over the whole optimizer step: the Gram matrix is summed over micro-batches and ranks before it is solved, in a
    forward pass of the student (without dropout) of its own. `c` bounds how far a teacher may dominate: ``c = 1`` is
    `mgda`, ``c <= 1/T`` is uniform. One weight per teacher and step. Solved exactly (`mtkd/weightings/hull.py`)
    for gradients of any norms.

    The authors' code takes each gradient's mean over the batch first (one vector of classes per teacher), may divide it
    by its norm, and gets C from the nu of a one-class support vector machine. Here, as in the paper's formula, the
    gradients of all positions count as they are.

    A small gradient attracts weight: a teacher near to the student counts more, right or wrong. Without a label row in
    the stage a teacher as unsure as a fresh student therefore wins (measured: tests/weightings/test_stress.py); with
    one, labels keep the student near to the teachers that are right.

    Source: Du et al. 2020, Agree to Disagree: Adaptive Ensemble Knowledge Distillation in Gradient Space, NeurIPS,
    the part on the tolerance parameter C.
    """

    def __init__(self, teachers: tuple[str, ...], c: float = 0.6) -> None:
        if not 0 < c <= 1:
            raise ValueError(f"c must be above 0, up to 1; found {c}")
        super().__init__(teachers, c)


@weighting("mgda", reads=("gram",))
class MGDA(_GradientSpace):
    """``argmin_w |sum_k w_k g_k|^2``, ``sum w = 1``, ``w >= 0``: the smallest vector in the hull of the gradients.

    Its negative is a direction in which no teacher's loss rises. Two teachers:
    ``w_1 = clip(<g_2 - g_1, g_2> / |g_1 - g_2|^2, 0, 1)``. Everything else as for `ae_kd`.

    Source: Sener and Koltun 2018, Multi-Task Learning as Multi-Objective Optimization, arXiv 1810.04650, section 3.2.
    """

    def __init__(self, teachers: tuple[str, ...]) -> None:
        super().__init__(teachers, 1.0)
