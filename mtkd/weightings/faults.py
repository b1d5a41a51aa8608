"""Weights that no stage can train with: negative, not a number, or 0 for every teacher.

The plan looks for them on made-up teachers (`mtkd.weightings.trial`). Training counts them next to the metrics and
reads the counts where metrics are read, so no step waits for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtkd.errors import UserError

_READ, _ZERO, _NEGATIVE, _LOST = (f"weight_fault/{name}" for name in ("read", "zero", "negative", "lost"))
FAULTS = (_READ, _ZERO, _NEGATIVE, _LOST)
"""Names of the counted positions among the metrics of a step."""

_DECLARE = "if it is meant: @mtkd.weighting(..., negative=True)"
_ADVICE = "look at its forward; `mtkd check FILE` runs the laws of weightings on a plug-in"


@torch.no_grad()
def weight_faults(weights: Tensor, read: Tensor, *, sound: Tensor) -> dict[str, Tensor]:
    """Count the positions that read faulty weights, as tensors: the GPU is not waited for.

    Args:
        weights: [T,B,L].
        read: where they are read, [B,L] bool.
        sound: whether the traits that they are made of are finite, [] bool. If not, the teachers are to blame, and the
            loss shows it.
    """
    faults = {
        _READ: read,
        _ZERO: read & (weights == 0).all(0),
        _NEGATIVE: read & (weights < 0).any(0),
        _LOST: read & ~weights.isfinite().all(0) & sound,
    }
    return {name: where.sum().float() for name, where in faults.items()}


def check_faults(means: Mapping[str, float], name: str, where: str, *, negative: bool) -> None:
    """Refuse a weighting by the counts of `weight_faults`.

    Args:
        negative: the weighting declares that its weights may be negative.

    Raises:
        UserError: with its name.
    """
    read = means.get(_READ, 0.0)
    if means.get(_LOST):
        raise UserError(f"weighting '{name}' gives weights that are not numbers", where=where, todo=_ADVICE)
    if means.get(_NEGATIVE) and not negative:
        raise UserError(f"weighting '{name}' gives negative weights", where=where, todo=f"{_ADVICE}; {_DECLARE}")
    if read and means.get(_ZERO, 0.0) == read:
        raise UserError(
            f"weighting '{name}' gives every teacher the weight 0: the student learns nothing from them",
            where=where,
            todo=_ADVICE,
        )
