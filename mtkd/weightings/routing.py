"""One teacher per example, named by the data."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits


@weighting("route", reads=("route",))
class Route(Weighting):
    """``w_k = 1`` for the teacher that the example's row names, 0 for the others.

    The name stands in the column `data.NAME.teacher` (by default "teacher"). A row without a name, or with one that is
    no teacher of the stage, is refused before training, with the row. Every teacher sees every example and the others'
    losses are multiplied by zero: which teacher runs never differs between ranks.

    Source: expert selection by domain; no paper in particular.
    """

    per_token = False

    def forward(self, traits: Traits) -> Tensor:
        weights = traits.full(1 / traits.num_teachers)  # of filler rows, which count nowhere
        teachers = torch.arange(traits.num_teachers, device=weights.device)[:, None]
        chosen = (traits.route[None] == teachers).float()[..., None]
        return chosen.where(traits.real[None, :, None], weights)
