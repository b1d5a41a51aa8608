"""How far teachers agree: the share of cases in which all choose the same, and how far apart their distributions are.

A case is an example of a classifier, a target position of a language model.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mtkd.models.features import SparseRows

Rows = Tensor | SparseRows
"""Logits [m,V] of a teacher, or the columns that its cache keeps."""


def tally(teachers: Sequence[Rows]) -> Tensor:
    """What m cases add to the sums, float64: [1 + pairs], equal choices, then Jensen-Shannon divergences of the pairs.

    Args:
        teachers: T at the same m positions.
    """
    choices = torch.stack([_choice(rows) for rows in teachers])  # [T,m]
    same = (choices == choices[0]).all(0).sum()
    parts = [divergence(one, other).sum() for one, other in itertools.combinations(teachers, 2)]
    return torch.stack([part.double() for part in (same, *parts)])


def summary(names: Sequence[str], cases: int, sums: Sequence[float]) -> dict[str, Any]:
    """The record of all cases.

    Args:
        cases: number of them, above 0.
        sums: of `tally`.
    """
    pairs = itertools.combinations(names, 2)
    apart = {f"{one}, {other}": value / cases for (one, other), value in zip(pairs, sums[1:], strict=True)}
    return {"teachers": list(names), "cases": cases, "same": sums[0] / cases, "divergence": apart}


def divergence(one: Rows, other: Rows) -> Tensor:
    """Jensen-Shannon divergence of two teachers, [m], nats, 0 to log 2.

    Of a cached one k columns and the mass of all others are known: then it is that of the columns that both know and
    one outcome for all others, which is at most that of the whole distributions.
    """
    p, q = _outcomes(one, other)
    return (_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2).clamp_min(0)


def _choice(rows: Rows) -> Tensor:
    """The most probable column, [m]."""
    if isinstance(rows, Tensor):
        return rows.argmax(-1)
    return rows.ids.gather(-1, rows.log_probs.argmax(-1, keepdim=True)).squeeze(-1)


def _outcomes(one: Rows, other: Rows) -> tuple[Tensor, Tensor]:
    """Probabilities of the same outcomes, [m,K] each, float64."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return _probabilities(one), _probabilities(other)
    if isinstance(one, Tensor):
        q, p = _outcomes(other, one)
        return p, q
    p = one.log_probs.double().exp()  # [m,k]
    if isinstance(other, Tensor):
        q = _probabilities(other).gather(-1, one.ids)
    else:
        ids, order = other.ids.sort(-1)
        mass = other.log_probs.double().exp().gather(-1, order).cumsum(-1)
        mass = torch.cat([mass.new_zeros(len(mass), 1), mass], -1)  # of the columns before each, [m,k+1]
        first, end = (torch.searchsorted(ids, one.ids, right=right) for right in (False, True))
        q = mass.gather(-1, end) - mass.gather(-1, first)  # unused places may have the column of a used one
        p = p * (end > first)
    return _with_rest(p), _with_rest(q)


def _probabilities(logits: Tensor) -> Tensor:
    return torch.softmax(logits.double(), -1)


def _with_rest(probs: Tensor) -> Tensor:
    """With one more outcome, for what is left of 1: [m,K+1]."""
    return torch.cat([probs, (1 - probs.sum(-1, keepdim=True)).clamp_min(0)], -1)


def _entropy(probs: Tensor) -> Tensor:
    return -torch.special.xlogy(probs, probs).sum(-1)
