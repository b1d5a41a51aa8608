"""Constant weights: the same for every example and step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtkd.errors import UserError
from mtkd.weightings.base import Weighting
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits


@weighting("uniform", reads=())
class Uniform(Weighting):
    """``w_k = 1/T``. Whether losses, probabilities or logits are averaged is the row's `ensemble`.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 3; You et al. 2017, Learning from Multiple Teacher Networks.
    """

    def forward(self, traits: Traits) -> Tensor:
        return traits.full(1 / traits.num_teachers)


def given_shares(weights: Mapping[str, float], teachers: Sequence[str], what: str, where: str) -> Tensor:
    """Weights by teacher name as shares, [T].

    Args:
        what: they are, for messages: "fixed weights".

    Raises:
        UserError: an unknown or missing teacher, a negative weight, or all zeros.
    """
    if not isinstance(weights, Mapping) or set(weights) != set(teachers):
        names = ", ".join(weights) if isinstance(weights, Mapping) else repr(weights)
        raise UserError(f"{what} name every teacher once", where=where, found=names, allowed=teachers)
    # Python's numbers: while a plan counts memory a tensor has no values.
    values = [float(weights[name]) for name in teachers]
    if not all(0 <= value < math.inf for value in values) or not any(values):
        raise UserError(f"{what} are non-negative, finite and not all zero", where=where, found=dict(weights))
    return torch.tensor(values) / sum(values)


@weighting("fixed", reads=())
class Fixed(Weighting):
    """Given weights, normalised to sum 1: ``options: {weights: {teacher name: weight, ...}}``.

    Raises: UserError for an unknown or missing teacher, a negative weight, or all zeros.
    """

    values: Tensor

    def __init__(self, teachers: tuple[str, ...], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.register_buffer("values", given_shares(weights, teachers, "fixed weights", "@weighting.options.weights"))

    def forward(self, traits: Traits) -> Tensor:
        return self.values[:, None, None].expand(traits.shape)
