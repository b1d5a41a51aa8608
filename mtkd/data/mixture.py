"""Which examples of several data sets make an epoch: a pure function of (seed, epoch), by weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Mixture:
    """The parts of a split and their shares of an epoch.

    An epoch has as many examples as the split. Of each part comes its share, in a shuffled order that goes on in
    the next epoch: an example of a part comes again when all others of the part have come.

    Attributes:
        names: of the parts.
        part_of: part of each example, [examples] int64.
        counts: examples of each part in an epoch, [parts] int64; at least one, in all as many as the split has.
    """

    names: tuple[str, ...]
    part_of: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, names: Sequence[str], weights: Sequence[float], part_of: np.ndarray) -> Mixture:
        """By weights, of which those of parts without examples do not count.

        Args:
            part_of: part of each example, [examples] int64.
        """
        there = np.bincount(part_of, minlength=len(names)) > 0
        shares = np.array(weights, np.float64) * there
        return cls(tuple(names), part_of, _apportioned(shares / shares.sum(), len(part_of), there))

    def epoch(self, seed: int, epoch: int) -> np.ndarray:
        """The examples of an epoch, part by part, [examples] int64."""
        chosen = []
        for part, count in enumerate(self.counts):
            members = np.flatnonzero(self.part_of == part)
            if not len(members):
                continue
            begin, end = epoch * int(count), (epoch + 1) * int(count)
            rounds = range(begin // len(members), -(-end // len(members)))
            order = [members[np.random.default_rng([seed, part, turn]).permutation(len(members))] for turn in rounds]
            first = begin - rounds.start * len(members)
            chosen.append(np.concatenate(order)[first : first + int(count)])
        return np.concatenate(chosen)

    def note(self) -> str:
        """The shares in words."""
        sizes = np.bincount(self.part_of, minlength=len(self.names))
        each = [f"{count:,} of {name} (it has {size:,})"
                for name, count, size in zip(self.names, self.counts, sizes, strict=True)]  # fmt: skip
        return f"an epoch has {len(self.part_of):,} examples: {', '.join(each)}"


def _apportioned(shares: np.ndarray, total: int, there: np.ndarray) -> np.ndarray:
    """Whole numbers of a sum by largest remainders; every part that is there has one."""
    exact = shares * total
    counts = np.maximum(np.floor(exact), there).astype(np.int64)
    while counts.sum() > total:  # parts with less than one took it from the largest
        counts[np.argmax(counts)] -= 1
    for part in np.argsort(-(exact - counts), kind="stable")[: total - int(counts.sum())]:
        counts[part] += 1
    return counts
