"""A weighting of your own. `plugins: [custom_weighting.py]` in the YAML next to this file makes its name known.

    mtkd run configs/custom_weighting.yaml
    mtkd check configs/custom_weighting.py

`check` runs the laws that the built-in weightings keep, and names the one that is broken.
"""

import torch
from torch import Tensor

import mtkd


@mtkd.weighting("softmax_ce", needs_labels=True, reads=("ce",))  # the plan asks what it reads
class SoftmaxCE(mtkd.Weighting):
    """``w = softmax_k(-CE(y, t_k) / tau)``: the teacher that predicts the labels best counts most. `tau` in nats."""

    def __init__(self, tau: float = 1.0) -> None:  # the constructor's parameters are the options of the YAML
        super().__init__()
        if tau <= 0:
            raise ValueError(f"tau must be positive; found {tau}")  # the user sees it with its place in the YAML
        self.tau = tau

    def forward(self, traits: mtkd.Traits) -> Tensor:
        """Weights, [T,B,L]; L is 1 under `per: example`, the tokens under `per: token`. Every trait has that shape."""
        return torch.softmax(-traits.ce / self.tau, 0)
