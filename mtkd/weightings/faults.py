"""Weights that no stage can train with: negative, not a number, or 0 for every teacher.

Looked for twice: at plan time on made-up teachers (`try_weighting`), and in training with numbers that are summed with
the metrics and read where these are read (`weight_faults`, `check_faults`): no step waits for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits
from mtkd.weightings.base import Weighting
from mtkd.weightings.traits import Around, Traits

_READ, _ZERO, _NEGATIVE, _LOST = (f"weight_fault/{name}" for name in ("read", "zero", "negative", "lost"))
FAULTS = (_READ, _ZERO, _NEGATIVE, _LOST)
"""Names of the counted positions among the metrics of a step."""

_DECLARE = "if it is meant: @mtkd.weighting(..., negative=True)"
_MEND = "look at its forward; `mtkd check FILE` runs the laws of weightings on a plug-in"
_SCALES = (0.3, 3.0, 100.0)  # of made-up logits: teachers that are unsure, sure, and certain


@torch.no_grad()
def weight_faults(weights: Tensor, read: Tensor, *, sound: Tensor) -> dict[str, Tensor]:
    """How many of the positions where weights are read have faulty ones; nothing is awaited.

    Args:
        weights: [T,B,L]. read: where they are read, [B,L] bool. sound: the traits that they were made of are finite, []
            bool: else the teachers are to blame, which the loss shows.
    """
    found = {
        _READ: read,
        _ZERO: read & (weights == 0).all(0),
        _NEGATIVE: read & (weights < 0).any(0),
        _LOST: read & ~weights.isfinite().all(0) & sound,
    }
    return {name: where.sum().float() for name, where in found.items()}


def check_faults(means: Mapping[str, float], name: str, where: str, *, negative: bool) -> None:
    """Refuse a weighting by what `weight_faults` counted.

    Args: negative: it declares that its weights may be.

    Raises:
        UserError: with its name.
    """
    read = means.get(_READ, 0.0)
    if means.get(_LOST):
        raise UserError(f"weighting '{name}' gives weights that are not numbers", where=where, todo=_MEND)
    if means.get(_NEGATIVE) and not negative:
        raise UserError(f"weighting '{name}' gives negative weights", where=where, todo=f"{_MEND}; {_DECLARE}")
    if read and means.get(_ZERO, 0.0) == read:
        raise UserError(
            f"weighting '{name}' gives every teacher the weight 0: the student learns nothing from them",
            where=where,
            todo=_MEND,
        )


def try_weighting(weighting: Weighting, name: str, teachers: int, *, per: str, token_level: bool, where: str) -> None:
    """Refuse at plan time what gives impossible weights to made-up teachers, whatever these predict.

    A weighting that cannot be run on them at all is left to the stage: it may ask for this stage's classes.

    Raises:
        UserError: see `check_faults`; weights of 0 are refused where all of them are.
    """
    totals = dict.fromkeys(FAULTS, 0.0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for traits in _made_up(weighting, teachers, per, token_level):
            with suppress(Exception):
                weights = weighting(traits)
                read = traits.mask if weights.shape[-1] > 1 else traits.real[:, None]
                for fault, count in weight_faults(weights, read, sound=traits.sound).items():
                    totals[fault] += float(count)
    check_faults(totals, name, where, negative=weighting.negative)


def _made_up(weighting: Weighting, teachers: int, per: str, token_level: bool) -> Iterator[Traits]:
    """Traits of random teachers on four examples, all of them labelled."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (4, 6) if token_level else (4,)
    tokens = torch.zeros(4, 6, dtype=torch.int64, device="cpu")
    for scale in _SCALES:
        logits = [DenseLogits(scale * torch.randn(*shape, 3, generator=generator)) for _ in range(teachers)]
        targets = torch.randint(0, 3, shape, generator=generator)
        batch = Batch(torch.arange(4), tokens, torch.ones_like(tokens).bool(), targets)
        gradients = torch.stack([x.values for x in logits]).flatten(1).double()
        around = Around(
            batch.keys,
            {**position_counts([batch]), **weighting.counts(batch)},
            student=DenseLogits(torch.randn(*shape, 3, generator=generator)),
            pooled=torch.randn(4, 1, generator=generator),
            routes=torch.arange(4) % teachers,
            gram=gradients @ gradients.t(),
        )
        yield Traits(logits, targets, targets != NO_LABEL, per, 8, around)
