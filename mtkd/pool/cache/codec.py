"""How the targets of a position become bytes: k sorted ids and their log-probabilities, or drawn ids with counts.

**Top.** The ids of a position, sorted, are coded as Elias and Fano did: of each id the lowest l = floor(log2(V/k)) bits
as they are, of the rest a bitmap with one 1 per id, ``k + ((V-1) >> l)`` bits. For k = 50 of V = 151,936 that is 674
bits, where no code for all sets does with fewer than log2 C(V,k) = 646. Log-probabilities stand in the order of the
ids, as distances from the largest one in steps of ``range / (2^bits - 1)``; even steps had the smallest divergence of
those tried. Only the most probable column is at distance 0, so that which it is comes back exactly; one less than half
a step below is put a whole step below. The largest log-probability itself is not stored: with the mass of the others
(the tail) known, it follows from the sum, so rounding never changes the total. Every position takes the same number of
bytes, so that any of them is found without an index.

**Sampled.** The distinct ids of k draws with their counts, whole bytes each; then a position's number of them.

Source: Elias 1974, Efficient storage and retrieval by content and address of static files; Fano 1971, On the number of
bits required to implement an associative memory. Draws: Anshumann et al. 2025, Sparse Logit Sampling: Accelerating
Knowledge Distillation in LLMs, arXiv 2503.16870.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOOR = -100.0
"""The smallest log-probability that is resolved, nats: exp(-100) is 0 in float32, but 0 * -100 is no NaN."""

_LEAST_STEP = 4e-6
"""Between two log-probabilities, nats: float32 tells them apart down to -32, and more than 1e-14 is kept of a mass."""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TopCodec:
    """k of V sorted ids with log-probabilities of `bits` bits, and the tail.

    Arrays per position: ``low`` [P,k] uint8, the lowest 8 bits of the ids (where l >= 8); ``packed`` [P,*] uint8, the
    bitmap, the ids' other low bits, the log-probabilities; ``range`` and ``tail`` [P] float16.
    """

    columns: int
    k: int
    bits: int

    @property
    def low_bits(self) -> int:
        return max((self.columns // self.k).bit_length() - 1, 0)

    @property
    def _whole(self) -> bool:
        return self.low_bits >= 8

    @property
    def _mid_bits(self) -> int:
        return self.low_bits - 8 if self._whole else self.low_bits

    @property
    def _map_bits(self) -> int:
        return self.k + ((self.columns - 1) >> self.low_bits)

    @property
    def bytes_per_position(self) -> int:
        packed = self._map_bits + self.k * (self._mid_bits + self.bits)
        return -(-packed // 8) + (self.k if self._whole else 0) + 4

    def encode(self, ids: np.ndarray, log_probs: np.ndarray, tail: np.ndarray) -> Arrays:
        """Arrays of P positions.

        Args:
            ids: distinct columns, [P,k] int64, in any order. log_probs: of these, [P,k], nats. tail: log of the
            others' mass, [P].
        """
        order = np.argsort(ids, 1)
        ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1).astype(np.float64)
        largest = log_probs.max(1, keepdims=True, initial=FLOOR)
        below = np.minimum(largest - np.maximum(log_probs, FLOOR), -FLOOR)
        # float16 may round down: the clamp below then moves the smallest by less than a step
        most, widest = 2**self.bits - 1, below.max(1, initial=0)
        spans = np.where(widest > 0, np.maximum(widest, most * _LEAST_STEP), 0).astype(np.float16)
        steps = most / np.where(spans > 0, spans, 1).astype(np.float64)
        levels = np.clip(np.rint(below * steps[:, None]), below > 0, most).astype(np.int64)
        mask = (1 << self._mid_bits) - 1
        mid = (ids >> 8 if self._whole else ids) & mask
        bits = [self._bitmap(ids >> self.low_bits), _as_bits(mid, self._mid_bits), _as_bits(levels, self.bits)]
        arrays = {
            "packed": np.packbits(np.concatenate(bits, 1), axis=1),
            "range": spans,
            "tail": np.clip(tail, FLOOR, 0).astype(np.float16),
        }
        return arrays | ({"low": (ids & 255).astype(np.uint8)} if self._whole else {})

    def _bitmap(self, high: np.ndarray) -> np.ndarray:
        bitmap = np.zeros((len(high), self._map_bits), np.uint8)
        np.put_along_axis(bitmap, high + np.arange(self.k), 1, 1)
        return bitmap

    def decode(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids [P,k] int64, rising; log-probabilities [P,k] float32; log tail [P] float32).

        Raises:
            ValueError: for bytes that `encode` cannot have written.
        """
        count = len(arrays["packed"])
        end = self._map_bits + self.k * self._mid_bits
        bits = np.unpackbits(arrays["packed"], axis=1, count=end + self.k * self.bits)
        ones = np.flatnonzero(np.ascontiguousarray(bits[:, : self._map_bits]))
        if len(ones) != count * self.k:
            raise ValueError("a position has another number of columns")
        high = ones.reshape(count, self.k) - np.arange(0, count * self._map_bits, self._map_bits)[:, None]
        high -= np.arange(self.k)
        if count and (high[:, 0].min() < 0 or high[:, -1].max() > (self.columns - 1) >> self.low_bits):
            raise ValueError("a position has another number of columns")
        ids = high << self._mid_bits | _as_numbers(bits[:, self._map_bits : end], self.k, self._mid_bits)
        if self._whole:
            ids = ids << 8 | arrays["low"]
        levels = _as_numbers(bits[:, end:], self.k, self.bits)
        log_probs = levels * (arrays["range"].astype(np.float32) / -(2**self.bits - 1))[:, None]
        tail = arrays["tail"].astype(np.float32)
        if count and not (np.isfinite(tail).all() and tail.max() <= 0 and np.isfinite(log_probs).all()):
            raise ValueError("a mass is not a number between 0 and 1")
        mass = np.log(-np.expm1(np.minimum(tail.astype(np.float64), -1e-9)))  # never 0: k columns have a mass
        sums = np.exp(log_probs).sum(1)  # at least 1: the largest is exp(0)
        log_probs += (mass - np.log(sums)).astype(np.float32)[:, None]
        return ids, log_probs, tail


@dataclass(frozen=True)
class SampledCodec:
    """Distinct ids of `draws` draws from V columns, each with its count and, from a proposal, its importance.

    Arrays: ``distinct`` [P] uint16, their number; ``draws`` [U,bytes] uint8, count and id of each, the lowest byte
    first; with a proposal also ``importance`` [U] float16, log p/q.
    """

    columns: int
    draws: int
    weighted: bool

    @property
    def _count_bits(self) -> int:
        return (self.draws - 1).bit_length()  # counts less one

    @property
    def bytes_per_id(self) -> int:
        return -(-((self.columns - 1).bit_length() + self._count_bits) // 8) + (2 if self.weighted else 0)

    def encode(self, ids: np.ndarray, counts: np.ndarray, importance: np.ndarray) -> Arrays:
        """Arrays of P positions.

        Args:
            ids: distinct columns, [P,u]. counts: draws of each, [P,u] int64, 0 in unused places. importance: log p/q
            of each, [P,u].
        """
        used = counts > 0
        words = (ids[used].astype(np.uint64) << np.uint64(self._count_bits)) | (counts[used] - 1).astype(np.uint64)
        width = self.bytes_per_id - (2 if self.weighted else 0)
        arrays = {
            "distinct": used.sum(1).astype(np.uint16),
            "draws": np.ascontiguousarray(words.astype("<u8").view(np.uint8).reshape(-1, 8)[:, :width]),
        }
        return arrays | ({"importance": importance[used].astype(np.float16)} if self.weighted else {})

    def decode(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """(ids [P,u] int64, log-weights [P,u] float32), u = the largest number of distinct ids.

        Unused places repeat id 0 with weight ``exp(FLOOR)``. Weights are ``count / draws * p / q``.

        Raises:
            ValueError: for bytes that `encode` cannot have written.
        """
        distinct = arrays["distinct"].astype(np.int64)
        total, width = int(distinct.sum()), arrays["draws"].shape[1]
        if total != len(arrays["draws"]):
            raise ValueError("a position has another number of draws")
        words = np.zeros((total, 8), np.uint8)
        words[:, :width] = arrays["draws"]
        numbers = words.view("<u8").reshape(-1).astype(np.int64)
        counts = (numbers & ((1 << self._count_bits) - 1)) + 1
        weights = np.log(counts / self.draws)
        if self.weighted:
            weights += arrays["importance"]
        most = int(distinct.max(initial=1))
        used = np.arange(most) < distinct[:, None]
        ids = np.zeros(used.shape, np.int64)
        log_weights = np.full(used.shape, FLOOR, np.float32)
        ids[used], log_weights[used] = numbers >> self._count_bits, weights
        sums = np.zeros(used.shape, np.int64)
        sums[used] = counts
        if total and (ids.max() >= self.columns or not np.isfinite(log_weights).all()):
            raise ValueError("a drawn column does not exist")
        if (sums.sum(1) != self.draws).any():
            raise ValueError("a position has another number of draws")
        return ids, log_weights


def _as_bits(numbers: np.ndarray, width: int) -> np.ndarray:
    """[P,k] -> [P,k*width] of 0 and 1, the highest bit of each number first."""
    shifts = np.arange(width - 1, -1, -1)
    return ((numbers[:, :, None] >> shifts) & 1).astype(np.uint8).reshape(len(numbers), -1)


def _as_numbers(bits: np.ndarray, k: int, width: int) -> np.ndarray:
    """The inverse of `_as_bits`: [P,k*width] -> [P,k], uint8 or uint16."""
    kind = np.uint8 if width <= 8 else np.uint16
    numbers = np.zeros((len(bits), k), kind)
    for place in range(width):
        numbers <<= kind(1)
        numbers |= bits[:, place::width]
    return numbers
