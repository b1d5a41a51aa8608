"""Some texts of a split, and the batches in which teachers are asked about them before a stage begins.

Nothing is drawn and the data stream does not move, so asking changes no bit of the run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mtkd.config import BatchConfig
from mtkd.data.batch import Batch
from mtkd.data.sampler import length_batches, slots
from mtkd.data.split import Split
from mtkd.engine.dist import Dist

# A look before a stage must take seconds, the stage takes hours.
MOST_BATCHES = 32


def labelled(split: Split) -> np.ndarray:
    """The examples with a label, [n] int; of tokens all."""
    return np.arange(len(split)) if split.labels is None else np.flatnonzero(split.labels >= 0)


def spread(texts: np.ndarray, most: int) -> np.ndarray:
    """At most so many of the texts, from all over them."""
    return texts[np.unique(np.linspace(0, max(len(texts) - 1, 0), min(most, len(texts))).astype(int))]


def batches_of(
    split: Split, texts: np.ndarray, batch: BatchConfig, dist: Dist, most: int | None = MOST_BATCHES
) -> Iterator[Batch]:
    """This rank's batches of the texts; every rank has the same number, for `forward` may be a collective.

    Args:
        batch: size of a batch that fits into memory.
        most: batches over all ranks and micro-batches, from all over the texts; None: all.
    """
    steps = list(length_batches(texts, split.lengths, batch))
    every = 1 if most is None else max(1, -(-len(steps) // most))
    for step in steps[::every]:
        for slot in slots(step.tolist(), dist.world_size, batch.accumulate, split.lengths)[dist.rank]:
            yield split.collate(slot, size=max(1, len(slot)))
