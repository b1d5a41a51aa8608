"""The base class of every weighting, built-in or a user's own."""

from __future__ import annotations

from torch import Tensor, nn

from mtkd.weightings.traits import Traits


class Weighting(nn.Module):
    """Maps facts about the teachers on a batch to their weights.

    A subclass implements `forward(traits) -> [T,B,L]`, where L is 1 for one weight per example. The constructor's
    parameters are the options of the YAML; one called `teachers` receives the teachers' names instead. Parameters and
    buffers are trained, sharded and saved with the student, because the weighting is a part of the objective.
    """

    def forward(self, traits: Traits) -> Tensor:
        """Weights, [T,B,L], non-negative, float32."""
        raise NotImplementedError

    def penalty(self) -> Tensor | None:
        """A scalar that learned and reinforced weightings add to the loss, or None."""
        return None
