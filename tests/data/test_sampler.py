"""Data order: a pure function of (seed, epoch), the same for any number of ranks, and each example once per epoch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from data_examples import sentences

from mtkd.config import BatchConfig
from mtkd.data.batch import Batch
from mtkd.data.load import LoadedData
from mtkd.data.sampler import Order, TrainStream, evaluation_batches, packed_slots, slots
from mtkd.data.split import Split
from mtkd.errors import DataError

Loader = Callable[..., LoadedData]
LENGTHS = np.random.default_rng(7).integers(1, 129, 1003)
BATCHES = [
    BatchConfig(sequences=16),
    BatchConfig(tokens=2048),
    BatchConfig(tokens=2048, packing=True),
    BatchConfig(sequences=16, group_by_length=True),
]


@pytest.fixture
def split(load: Loader) -> Split:
    return load({"text": sentences(133)}, task="masked-lm").splits["train"]


def epoch_batches(order: Order, epoch: int) -> list[list[int]]:
    return [order.global_batch(epoch, position) for position in range(order.num_batches(epoch))]


def same(left: Batch, right: Batch) -> bool:
    fields = ("keys", "input_ids", "attention_mask", "targets")
    return all(torch.equal(getattr(left, name), getattr(right, name)) for name in fields)


def seen(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.keys if i >= 0]


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_each_example_once_per_epoch(batch: BatchConfig, shuffle: bool) -> None:
    order = Order(LENGTHS, batch, seed=3, shuffle=shuffle)
    for epoch in (0, 1, 0):
        assert sorted(chain.from_iterable(epoch_batches(order, epoch))) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("batch", BATCHES)
def test_order_is_a_pure_function_of_seed_and_epoch(batch: BatchConfig) -> None:
    first, second = Order(LENGTHS, batch, seed=3), Order(LENGTHS, batch, seed=3)
    expected = epoch_batches(first, 2)
    epoch_batches(second, 0)
    assert second.global_batch(2, 5) == expected[5]
    assert epoch_batches(second, 2) == expected
    assert epoch_batches(first, 1) != expected
    assert epoch_batches(Order(LENGTHS, batch, seed=4), 2) != expected
    assert epoch_batches(Order(LENGTHS, batch, seed=-1), 0)


def test_the_last_partial_batch_is_kept() -> None:
    sizes = [len(b) for b in epoch_batches(Order(LENGTHS, BATCHES[0], 0), 0)]
    assert sizes == [16] * (1003 // 16) + [1003 % 16]
    assert Order(LENGTHS, BATCHES[0], 0, shuffle=False).global_batch(0, 1) == list(range(16, 32))


def test_batches_stay_within_the_token_budget_and_waste_little() -> None:
    lengths = np.concatenate([LENGTHS, [5000]])
    batches = epoch_batches(Order(lengths, BATCHES[1], 0), 0)
    padded = [int(lengths[b].max()) * len(b) for b in batches]
    too_large = [b for b, size in zip(batches, padded, strict=True) if size > 2048]
    assert too_large == [[1003]]
    fits = [size for size in padded if size <= 2048]
    assert LENGTHS.sum() / sum(fits) > 0.9  # shuffled batches of these lengths are half padding
    assert np.mean(fits) > 0.8 * 2048
    longest = [int(lengths[b].max()) for b in batches]
    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_a_packed_budget_counts_real_tokens_in_random_order() -> None:
    lengths = np.concatenate([LENGTHS, [5000]])
    batches = epoch_batches(Order(lengths, BATCHES[2], 0), 0)
    sizes = [int(lengths[b].sum()) for b in batches]
    assert [b for b, size in zip(batches, sizes, strict=True) if size > 2048] == [[1003]]
    after = [lengths[b[0]] for b in batches[1:]]
    assert all(size + following > 2048 for size, following in zip(sizes, after, strict=False))  # none ends early
    assert np.mean([lengths[b].std() for b in batches if len(b) > 1]) > 0.8 * LENGTHS.std()  # nothing is grouped


def test_grouping_by_length_saves_padding_and_keeps_the_sizes() -> None:
    plain, grouped = (epoch_batches(Order(LENGTHS, batch, 0), 0) for batch in (BATCHES[0], BATCHES[3]))
    assert sorted(map(len, grouped)) == sorted(map(len, plain))
    useful = [LENGTHS.sum() / sum(LENGTHS[b].max() * len(b) for b in batches) for batches in (plain, grouped)]
    assert useful[0] < 0.6
    assert useful[1] > 0.9
    longest = [int(LENGTHS[b].max()) for b in grouped]
    assert longest != sorted(longest, reverse=True)
    ordered = Order(LENGTHS, BATCHES[3], 0, shuffle=False)
    assert ordered.global_batch(0, 0)[0] == int(np.argmax(LENGTHS))


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 7)])
def test_packed_slots_hold_about_as_many_tokens_each(world_size: int, accumulate: int) -> None:
    examples = list(range(100, 220))
    dealt = packed_slots(examples, world_size, accumulate, LENGTHS)
    assert [len(rank) for rank in dealt] == [accumulate] * world_size
    assert sorted(e for rank in dealt for micro in rank for e in micro) == examples
    tokens = [int(LENGTHS[micro].sum()) for rank in dealt for micro in rank]
    # the slot that got the last example was the emptiest: what lies between the slots is one short example at most
    assert max(tokens) - min(tokens) <= int(np.sort(LENGTHS[examples])[: len(tokens)].max())
    assert packed_slots([7], world_size, accumulate, LENGTHS)[0][0] == [7]


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (1, 3), (4, 2), (3, 7)])
def test_slots_deal_every_example_once(world_size: int, accumulate: int) -> None:
    examples = [5, 900, 17, 3, 44, 602, 71, 8, 11, 250]
    dealt = slots(examples, world_size, accumulate, LENGTHS)
    assert [len(rank) for rank in dealt] == [accumulate] * world_size
    flat = [e for rank in dealt for micro in rank for e in micro]
    assert sorted(flat) == sorted(examples)
    sizes = [len(micro) for rank in dealt for micro in rank]
    assert max(sizes) - min(sizes) <= 1
    assert dealt == slots(list(examples), world_size, accumulate, LENGTHS)
    by_turn = [LENGTHS[dealt[rank][micro]] for micro in range(accumulate) for rank in range(world_size)]
    filled = [part for part in by_turn if len(part)]
    assert all(left.min() >= right.max() for left, right in pairwise(filled))


@pytest.mark.parametrize(
    "batch",
    [
        BatchConfig(sequences=8),
        BatchConfig(tokens=400),
        BatchConfig(tokens=400, packing=True),
        BatchConfig(sequences=8, group_by_length=True),
    ],
)
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (2, 3)])
def test_state_after_40_batches_gives_the_next_20(
    batch: BatchConfig, world_size: int, accumulate: int, split: Split
) -> None:
    for rank in range(world_size):
        stream = TrainStream(split, Order(split.lengths, batch, 5), rank, world_size, accumulate)
        for _ in range(40):
            next(stream)
        state = stream.state()
        expected = [next(stream) for _ in range(20)]
        resumed = TrainStream(split, Order(split.lengths, batch, 5), rank, world_size, accumulate)
        resumed.load_state(state)
        assert set(state) == {"epoch", "position"}
        for left in expected:
            right = next(resumed)
            assert len(left) == len(right) == accumulate
            assert all(same(a, b) for a, b in zip(left, right, strict=True))
    assert state["epoch"] >= 1  # the 20 batches were not the first of an epoch only


def test_resuming_at_an_epoch_end_starts_the_next_one(split: Split) -> None:
    order = Order(split.lengths, BatchConfig(sequences=50), 0)
    stream = TrainStream(split, order, 0, 1, 1)
    for _ in range(order.num_batches(0)):
        next(stream)
    state = stream.state()
    expected = next(stream)
    resumed = TrainStream(split, order, 0, 1, 1)
    resumed.load_state(state)
    assert seen(next(resumed)) == seen(expected)
    assert sorted(seen(expected)) == sorted(order.global_batch(1, 0))
    with pytest.raises(DataError, match="saved position"):
        resumed.load_state({"epoch": 0, "position": 99})


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("packing", [False, True])
def test_the_global_batch_does_not_depend_on_the_world_size(world_size: int, packing: bool, split: Split) -> None:
    batch = BatchConfig(sequences=10, packing=packing)
    order = Order(split.lengths, batch, 1)
    streams = [TrainStream(split, Order(split.lengths, batch, 1), rank, world_size, 2) for rank in range(world_size)]
    epoch: list[int] = []
    for position in range(order.num_batches(0)):
        together = sorted(seen([b for stream in streams for b in next(stream)]))
        assert together == sorted(order.global_batch(0, position))
        epoch += together
    assert Counter(epoch) == Counter(range(len(split)))


def test_an_empty_slot_is_a_filler_batch(split: Split) -> None:
    streams = [TrainStream(split, Order(split.lengths, BatchConfig(sequences=3), 0), r, 4, 2) for r in range(4)]
    steps = [next(stream) for stream in streams]
    assert [len(step) for step in steps] == [2] * 4
    assert len(seen([b for step in steps for b in step])) == 3
    assert sum(int(b.real.any()) for step in steps for b in step) == 3


def test_the_stream_passes_its_epoch_to_the_masking(split: Split) -> None:
    order = Order(split.lengths, BatchConfig(sequences=len(split)), 0)
    stream = TrainStream(split, order, 0, 1, 1)
    for epoch in range(3):
        batch = next(stream)[0]
        assert same(batch, split.collate(batch.keys.tolist(), epoch=epoch))
        assert not torch.equal(batch.targets, split.collate(batch.keys.tolist(), epoch=epoch + 1).targets)


@pytest.mark.parametrize(
    "batch", [BatchConfig(sequences=8), BatchConfig(tokens=300), BatchConfig(sequences=7, accumulate=2)]
)
@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_evaluation_scores_every_example_once(batch: BatchConfig, world_size: int, split: Split) -> None:
    ranks = [list(evaluation_batches(split, batch, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(i for batches in ranks for i in seen(batches)) == list(range(len(split)))
    for batches in ranks:
        for found in batches:
            real = found.keys[found.real].tolist()
            assert not real or same(found, split.collate(real))  # epoch 0 masking


def test_five_examples_on_four_ranks(load: Loader) -> None:
    split = load({"text": sentences(5)}).splits["train"]
    ranks = [list(evaluation_batches(split, BatchConfig(sequences=4), rank, 4)) for rank in range(4)]
    assert [len(batches) for batches in ranks] == [2] * 4
    assert sum(len(seen(batches)) for batches in ranks) == 5


def test_no_examples_are_refused() -> None:
    with pytest.raises(DataError):
        Order(np.array([]), BATCHES[0], 0)
