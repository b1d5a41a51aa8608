"""A trial of a weighting on made-up teachers shows what it reads and whether its weights are sound.

No model is known yet. The stage's own examples may show more; training checks those.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch

from mtkd.data.batch import Batch, position_counts
from mtkd.models.features import DenseLogits
from mtkd.weightings.base import Weighting
from mtkd.weightings.faults import FAULTS, weight_faults
from mtkd.weightings.traits import Around, Traits

_SCALES = (0.3, 3.0, 100.0)
"""Sizes of the made-up logits: teachers that are unsure, sure, and certain."""


@dataclass(frozen=True)
class Trial:
    """The result of a trial.

    Attributes:
        names: the traits and facts that were read.
        faults: counts, as `mtkd.weightings.faults.check_faults` reads them.
    """

    names: frozenset[str]
    faults: Mapping[str, float]


def try_weighting(weighting: Weighting, num_teachers: int, *, per: str, token_level: bool) -> Trial:
    """Run a weighting on made-up teachers of three classes or tokens.

    One that cannot be run on them is left to the stage: it may ask for this stage's number of classes.
    """
    totals, names = dict.fromkeys(FAULTS, 0.0), set[str]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for traits in _made_up(weighting, num_teachers, per, token_level):
            with suppress(Exception):
                weights = weighting(traits)
                read = traits.mask if weights.shape[-1] > 1 else traits.real[:, None]
                for fault, count in weight_faults(weights, read, sound=traits.sound).items():
                    totals[fault] += float(count)
                weighting.penalty(traits)
            names |= traits.names
    return Trial(frozenset(names), totals)


def _made_up(weighting: Weighting, num_teachers: int, per: str, token_level: bool) -> Iterator[Traits]:
    """Traits of random teachers on four examples, all of them labelled."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    shape = (4, 6) if token_level else (4,)
    tokens = torch.zeros(4, 6, dtype=torch.int64, device="cpu")
    for scale in _SCALES:
        logits = [DenseLogits(scale * torch.randn(*shape, 3, generator=generator)) for _ in range(num_teachers)]
        targets = torch.randint(0, 3, shape, generator=generator)
        routes = torch.arange(4) % max(num_teachers, 1)
        batch = Batch(torch.arange(4), tokens, torch.ones_like(tokens).bool(), targets, routes=routes)
        gradients = torch.stack([x.values for x in logits]).flatten(1).double()  # [T,n]
        around = Around(
            batch,
            {**position_counts([batch]), **weighting.counts(batch)},
            student={
                "logits": DenseLogits(torch.randn(*shape, 3, generator=generator)),
                "hidden": torch.randn(4, 6, 1, generator=generator),
            },
            gram=gradients @ gradients.t(),
        )
        yield Traits(logits, around, per, tile=8)
