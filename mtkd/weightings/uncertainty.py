"""Which size of teacher suits the student just now: the more uncertain the student, the smaller the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits

_MODES = ("hard", "soft")


@weighting("uncertainty", reads=("student_uncertainty",))
class Uncertainty(Weighting):
    """Teachers in order of size, chosen by the student's entropy H_S: uncertain -> small, certain -> large.

    With ``u = H_S / log V`` (0 to 1) and D different sizes, numbered from 0 (smallest) to D - 1:

    ``hard``: the teacher number ``floor((1 - u) D)`` counts alone (the last one at u = 0).
    ``soft``: linear between the two neighbours of ``x = (1 - u)(D - 1)``: ``w_d = max(0, 1 - |x - d|)``. Two teachers
    have the weights u (small) and 1 - u (large), as in the paper.

    The paper's hard form ranks the examples of a batch and gives either teacher half of them. Here u itself decides, so
    that an example's weights do not depend on the others in its batch, nor on how the batch is cut. Teachers of equal
    size share equally. The student's entropy is detached; per example it is the mean over the targets. With one output
    column (regression) there is no uncertainty: the largest teacher counts alone.

    Source: Li et al. 2021, Dynamic Knowledge Distillation for Pre-trained Language Models, arXiv 2109.11295, the part
    on dynamic teacher adoption.
    """

    def __init__(self, facts: StageFacts, mode: str = "soft") -> None:
        super().__init__()
        if mode not in _MODES:
            raise ValueError(f"mode must be one of {', '.join(_MODES)}; found {mode}")
        self.mode = mode
        sizes = sorted(set(facts.sizes))
        self._numbers = [sizes.index(size) for size in facts.sizes]
        self._sharing = [facts.sizes.count(size) for size in facts.sizes]
        self._count = len(sizes)

    def forward(self, traits: Traits) -> Tensor:
        sureness = 1 - traits.student_uncertainty
        if self.mode == "hard":
            place = (sureness * self._count).floor().clamp_max(self._count - 1)
        else:
            place = sureness * (self._count - 1)
        values = [(1 - (place - d).abs()).clamp_min(0) / n for d, n in zip(self._numbers, self._sharing, strict=True)]
        return torch.stack(values)
