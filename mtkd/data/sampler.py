"""Which examples make which optimizer step, on which rank: a pure function of (seed, epoch), and two integers of state.

The examples of a step do not depend on the number of ranks; only their distribution over ranks and micro-batches does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtkd.errors import DataError

if TYPE_CHECKING:
    from mtkd.config import BatchConfig, ScoringBatchConfig
    from mtkd.data.batch import Batch
    from mtkd.data.mixture import Mixture
    from mtkd.data.split import Split

# Examples are sorted by length within shuffled groups of about this many batches: long enough that a batch wastes
# little padding, short enough that which examples meet is still random.
_GROUPED_BATCHES = 50


class Order:
    """The order of a split's examples, epoch by epoch; each example once per epoch, the last partial batch kept.

    With `sequences` the shuffled examples are cut as they come, or with `group_by_length` by length within shuffled
    groups. With `tokens` they are grouped by length too: a batch is as many examples as its longest one allows, and an
    example longer than the budget is a batch by itself. With `packing` a budget counts real tokens, and they are cut as
    they come.

    Args:
        lengths: tokens per example, [examples].
        seed: of the shuffle.
        shuffle: False: in the order of the split (sorted by length with `tokens`).
        mixture: which examples an epoch has where several data are mixed; else each once.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch: BatchConfig,
        seed: int,
        shuffle: bool = True,
        mixture: Mixture | None = None,
    ) -> None:
        if not len(lengths):
            raise DataError("there are no examples to make batches of", where="@data")
        self._lengths = np.asarray(lengths, np.int64)
        self._batch = batch
        self._seed = seed % 2**64  # seeds of numpy are not negative
        self._shuffle, self._mixture = shuffle, mixture
        self._epoch = -1
        self._batches: list[np.ndarray] = []

    @property
    def packing(self) -> bool:
        """Whether models run without padding: then micro-batches are alike in tokens, not in the lengths of theirs."""
        return self._batch.packing

    def num_batches(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return len(self._of(epoch))

    def global_batch(self, epoch: int, position: int) -> list[int]:
        """Example numbers of the optimizer step at a position (from 0) of an epoch (from 0), over all ranks."""
        return [int(example) for example in self._of(epoch)[position]]

    def _of(self, epoch: int) -> list[np.ndarray]:
        if epoch != self._epoch:
            self._batches, self._epoch = self._arrange(epoch), epoch
        return self._batches

    def _arrange(self, epoch: int) -> list[np.ndarray]:
        random = np.random.default_rng([self._seed, epoch])
        examples = random.permutation(len(self._lengths)) if self._shuffle else np.arange(len(self._lengths))
        if self._mixture is not None:
            examples = self._mixture.epoch(self._seed, epoch)[examples]
        if self._batch.sequences is not None:
            return self._by_count(examples, self._batch.sequences, random)
        assert self._batch.tokens is not None
        if self._batch.packing:
            return packed_batches(examples, self._lengths, self._batch.tokens)
        if not self._shuffle:
            return token_batches(examples, self._lengths, self._batch.tokens)
        batches: list[np.ndarray] = []
        group_tokens = self._batch.tokens * _GROUPED_BATCHES
        groups = np.cumsum(self._lengths[examples]) // group_tokens
        for group in np.split(examples, np.flatnonzero(np.diff(groups)) + 1):
            batches += token_batches(group, self._lengths, self._batch.tokens)
        return [batches[i] for i in random.permutation(len(batches))]

    def _by_count(self, examples: np.ndarray, count: int, random: np.random.Generator) -> list[np.ndarray]:
        """Batches of `count` examples, in the order given or grouped by length."""
        cuts = range(0, len(examples), count)
        if not self._batch.group_by_length:
            return [examples[i : i + count] for i in cuts]
        if not self._shuffle:
            ordered = by_length(examples, self._lengths)
            return [ordered[i : i + count] for i in cuts]
        size = count * _GROUPED_BATCHES  # a multiple of a batch: only the last one of the epoch may be smaller
        groups = [by_length(examples[i : i + size], self._lengths) for i in range(0, len(examples), size)]
        batches = [group[i : i + count] for group in groups for i in range(0, len(group), count)]
        return [batches[i] for i in random.permutation(len(batches))]


def packed_batches(examples: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Examples in the order given, cut so that a batch's own tokens stay within `budget`; one alone may exceed it."""
    batches: list[np.ndarray] = []
    start, total = 0, 0
    for end, example in enumerate(examples):
        length = int(lengths[example])
        if end > start and total + length > budget:
            batches.append(examples[start:end])
            start, total = end, 0
        total += length
    return [*batches, examples[start:]]


def token_batches(examples: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """Examples by falling length, cut so that longest x count stays within `budget` tokens; one alone may exceed it."""
    ordered = by_length(examples, lengths)
    batches: list[np.ndarray] = []
    start = 0
    while start < len(ordered):
        count = max(1, budget // max(1, int(lengths[ordered[start]])))
        batches.append(ordered[start : start + count])
        start += count
    return batches


def length_batches(examples: np.ndarray, lengths: np.ndarray, batch: ScoringBatchConfig) -> list[np.ndarray]:
    """Examples by falling length, as many at a time as `batch` says."""
    if batch.tokens is not None:
        return token_batches(examples, lengths, batch.tokens)
    assert batch.sequences is not None
    ordered = by_length(examples, lengths)
    return [ordered[i : i + batch.sequences] for i in range(0, len(ordered), batch.sequences)]


def by_length(examples: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Examples by falling length, equal ones in the order given."""
    return examples[np.argsort(-lengths[examples], kind="stable")]


def slots(examples: Sequence[int], world_size: int, accumulate: int, lengths: np.ndarray) -> list[list[list[int]]]:
    """Deal the examples of one step out: [rank][micro-batch] -> example numbers; a slot may be empty.

    Neighbours in length share a slot (little padding), and the ranks' slots of one micro-batch are neighbours too, so
    that no rank waits for the others.
    """
    ordered = by_length(np.asarray(examples, np.int64), lengths)
    parts = np.array_split(ordered, world_size * accumulate)
    return [[[int(e) for e in parts[m * world_size + rank]] for m in range(accumulate)] for rank in range(world_size)]


def packed_slots(
    examples: Sequence[int], world_size: int, accumulate: int, lengths: np.ndarray
) -> list[list[list[int]]]:
    """As `slots` for models that run without padding: [rank][micro-batch] with about equal numbers of tokens.

    The longest example first, each into the slot with the fewest tokens so far.
    """
    parts: list[list[int]] = [[] for _ in range(world_size * accumulate)]
    tokens = [0] * len(parts)
    for example in by_length(np.asarray(examples, np.int64), lengths):
        least = tokens.index(min(tokens))
        parts[least].append(int(example))
        tokens[least] += int(lengths[example])
    return [[parts[m * world_size + rank] for m in range(accumulate)] for rank in range(world_size)]


class TrainStream:
    """Endless micro-batches of one rank, one optimizer step at a time, epoch after epoch.

    `state()` before a step and `load_state` later give the same step again. Every rank gets `accumulate` micro-batches
    per step; where the examples do not suffice, one of filler rows.
    """

    def __init__(self, split: Split, order: Order, rank: int, world_size: int, accumulate: int) -> None:
        self._split, self._order = split, order
        self._rank, self._world_size, self._accumulate = rank, world_size, accumulate
        self._epoch, self._position = 0, 0

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        if self._position >= self._order.num_batches(self._epoch):
            self._epoch, self._position = self._epoch + 1, 0
        examples = self._order.global_batch(self._epoch, self._position)
        deal = packed_slots if self._order.packing else slots
        dealt = deal(examples, self._world_size, self._accumulate, self._split.lengths)[self._rank]
        epoch = self._epoch
        self._position += 1
        return [self._split.collate(slot, size=max(1, len(slot)), epoch=epoch) for slot in dealt]

    def state(self) -> dict[str, int]:
        """Epoch and position of the next step; enough to go on from."""
        return {"epoch": self._epoch, "position": self._position}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken; raises DataError when it cannot be of this data."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position <= self._order.num_batches(max(epoch, 0)):
            raise DataError(
                "the saved position is not one of this data",
                where="@stage",
                found=dict(state),
                allowed=f"0 to {self._order.num_batches(max(epoch, 0))} batches of an epoch",
            )
        self._epoch, self._position = epoch, position


def evaluation_batches(split: Split, batch: ScoringBatchConfig, rank: int, world_size: int) -> Iterator[Batch]:
    """Every example once over the ranks, by falling length; the same number of batches on every rank.

    `batch` counts over all ranks and its `accumulate` pieces, as in training.
    """
    for step in length_batches(np.arange(len(split)), split.lengths, batch):
        for slot in slots(step.tolist(), world_size, batch.accumulate, split.lengths)[rank]:
            yield split.collate(slot, size=max(1, len(slot)))
