"""The codec of a cache: what comes back, how many bytes it takes, and how far it is from the teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mtkd.pool.cache.codec import FLOOR, SampledCodec, TopCodec


def zipf(columns: int, positions: int, seed: int) -> np.ndarray:
    """Log-probabilities that fall off with the rank as those of a language model do, in a random order of columns."""
    generator = np.random.default_rng(seed)
    slope, noise = generator.uniform(1, 2, (positions, 1)), generator.standard_normal((positions, columns))
    logits = -slope * np.log(np.arange(1, columns + 1)) + noise
    logits = generator.permuted(logits, axis=1)
    return logits - np.logaddexp.reduce(logits, 1, keepdims=True)


def top(log_probs: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.argsort(-log_probs, 1)[:, :k]
    kept = np.take_along_axis(log_probs, ids, 1)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - np.exp(kept).sum(1), 0))
    return ids, kept, tail


@pytest.mark.parametrize(("columns", "k"), [(151_936, 50), (32_000, 128), (300, 1), (300, 50), (300, 300), (7, 3)])
@pytest.mark.parametrize("bits", [4, 6, 9])
def test_round_trip(columns: int, k: int, bits: int) -> None:
    ids, kept, tail = top(zipf(columns, 5, 0), k)
    codec = TopCodec(columns, k, bits)
    coded = codec.encode(ids, kept, tail)
    found, log_probs, found_tail = codec.decode(coded)
    order = np.argsort(ids, 1)
    np.testing.assert_array_equal(found, np.take_along_axis(ids, order, 1))
    exact = np.take_along_axis(kept, order, 1)
    step = (kept.max(1) - kept.min(1)) / (2**bits - 1)
    # half a step, the rounding of the range (2^-11), and what both do to the sum
    assert (np.abs(log_probs - exact) <= (1.1 * step + 2e-3 * (1 + (kept.max(1) - kept.min(1))))[:, None]).all()
    np.testing.assert_allclose(np.exp(log_probs).sum(1) + np.exp(found_tail), 1, atol=1e-5)
    assert sum(array.nbytes for array in coded.values()) == 5 * codec.bytes_per_position


def test_bytes_per_position_and_divergence_at_the_scale_of_real_vocabularies() -> None:
    log_probs = zipf(151_936, 40, 1)
    for k, bits, most_bytes, most_kl in ((50, 6, 127, 3e-4), (128, 6, 296, 6e-4), (128, 8, 328, 5e-5)):
        ids, kept, tail = top(log_probs, k)
        codec = TopCodec(151_936, k, bits)
        assert codec.bytes_per_position <= most_bytes
        found, back, back_tail = codec.decode(codec.encode(ids, kept, tail))
        exact = np.take_along_axis(log_probs, found, 1)
        kl = (np.exp(exact) * (exact - back)).sum(1) + np.exp(tail) * (tail - back_tail)
        assert 0 <= kl.mean() <= most_kl
        # ids cannot take fewer bits than the logarithm of the number of sets of k columns
        low = math.lgamma(151_937) - math.lgamma(k + 1) - math.lgamma(151_937 - k)
        ids_bytes = codec.bytes_per_position - k * bits / 8 - 4
        assert low / math.log(2) / 8 <= ids_bytes <= 1.06 * low / math.log(2) / 8


def test_extreme_positions_survive() -> None:
    """One certain column, masked columns, equal columns."""
    certain = np.array([[0.0, -200.0, -np.inf], [math.log(1 / 3)] * 3])
    ids = np.array([[4, 9, 2], [9, 0, 1]])
    codec = TopCodec(10, 3, 6)
    found, back, tail = codec.decode(codec.encode(ids, certain, np.array([-np.inf, -np.inf])))
    assert np.isfinite(back).all()
    assert (tail == FLOOR).all()
    np.testing.assert_array_equal(found, [[2, 4, 9], [0, 1, 9]])
    np.testing.assert_allclose(np.exp(back), [[0, 1, 0], [1 / 3] * 3], atol=1e-6)


def test_bytes_that_were_never_written_are_refused() -> None:
    ids, kept, tail = top(zipf(3000, 4, 2), 20)
    codec = TopCodec(3000, 20, 6)
    coded = codec.encode(ids, kept, tail)
    for broken in (np.zeros_like(coded["packed"]), np.full_like(coded["packed"], 255)):
        with pytest.raises(ValueError, match="number of columns"):
            codec.decode(coded | {"packed": broken})
    with pytest.raises(ValueError, match="mass"):
        codec.decode(coded | {"tail": np.full(4, np.nan, np.float16)})


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("columns", "draws", "size"), [(151_936, 50, 3), (1000, 7, 2), (2**24 - 1, 300, 5)])
def test_draws_come_back(columns: int, draws: int, size: int, weighted: bool) -> None:
    generator = np.random.default_rng(0)
    drawn = np.minimum(generator.geometric(0.2, (6, draws)) * 37, columns - 1)
    ids, counts = np.zeros((6, draws), np.int64), np.zeros((6, draws), np.int64)
    for row in range(6):
        values, numbers = np.unique(drawn[row], return_counts=True)
        ids[row, : len(values)], counts[row, : len(values)] = values, numbers
    importance = generator.normal(size=ids.shape)
    codec = SampledCodec(columns, draws, weighted)
    coded = codec.encode(ids, counts, importance)
    found, log_weights = codec.decode(coded)
    assert coded["draws"].shape[1] == size == codec.bytes_per_id - 2 * weighted
    for row in range(6):
        used = counts[row] > 0
        weights = counts[row][used] / draws * np.exp(importance[row][used] * weighted)
        wanted = dict(zip(ids[row][used], weights, strict=True))
        back = {i: w for i, w in zip(found[row], np.exp(log_weights[row]), strict=True) if w > 1e-30}
        assert back.keys() == wanted.keys()
        assert all(back[i] == pytest.approx(wanted[i], rel=2e-3 if weighted else 1e-6) for i in wanted)
    with pytest.raises(ValueError, match="number of draws"):
        codec.decode(coded | {"distinct": coded["distinct"] + np.uint16(1)})


@pytest.mark.parametrize("bits", [4, 6, 12])
def test_which_column_is_the_most_probable_is_exact(bits: int) -> None:
    """Also when the next one is nearer than half a step, or the next float32; equal ones stay equal."""
    ids, kept, tail = top(zipf(2000, 400, 3), 30)
    kept = kept.astype(np.float32)
    kept[::4, 1] = kept[::4, 0] - 0.01
    kept[1::4, 1] = np.nextafter(kept[1::4, 0], np.float32(-np.inf))
    kept[2::4] = kept[2::4, :1]
    kept[2::4, 1:] = np.nextafter(kept[2::4, 1:], np.float32(-np.inf))  # all of them within one float32
    kept[3::4, 1] = kept[3::4, 0]
    codec = TopCodec(2000, 30, bits)
    found, back, _ = codec.decode(codec.encode(ids, kept, tail))
    place = back.argmax(1)
    equal = np.arange(400) % 4 == 3
    np.testing.assert_array_equal(np.take_along_axis(found, place[:, None], 1)[~equal, 0], ids[~equal, 0])
    first = np.minimum(ids[:, 0], ids[:, 1])  # as argmax over the whole row says
    np.testing.assert_array_equal(np.take_along_axis(found, place[:, None], 1)[equal, 0], first[equal])
    step = (kept.max(1) - kept.min(1)) / (2**bits - 1) + 1e-5
    order = np.argsort(ids, 1)
    spread = np.take_along_axis(kept - kept.max(1, keepdims=True), order, 1)
    assert (np.abs(back - back.max(1, keepdims=True) - spread) <= 1.01 * step[:, None] + 1e-2).all()
