"""The smallest vector in the hull of a few vectors, of which only the inner products are known.

A quadratic program of one variable per teacher. Its variables are scaled by the vectors' norms first: what counts is
then each vector's direction, and norms that differ by a factor of 10^4 and more do no harm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ENUMERATED = 6
"""Up to this many vectors every set of bounds is tried: 3^6 systems of 7 equations, about 20 ms."""

_FREE, _LOWER, _UPPER = 0, 1, 2
_RANK = 1e-11  # singular values below this share of the largest one count as 0
_SLACK = 1e-9  # of a bound, in units of the shortest vector's weight
_TIE = 1e-12  # objectives that differ by less than this share of their terms are equal


def smallest_norm(gram: Array, largest: float) -> Array:
    """``argmin_w w' G w`` with ``sum w = 1`` and ``0 <= w <= largest``, [T] float64.

    Of several minimisers the most even one (smallest ``|w|``), for up to `ENUMERATED` vectors; NaN where G is not
    finite.

    Args:
        gram: G, [T,T], positive semi-definite; its scale does not matter.
        largest: C; at and below 1/T only the uniform weights are left.
    """
    count = len(gram)
    uniform = np.full(count, 1 / count)
    if not np.isfinite(gram).all():
        return np.full(count, np.nan)  # the objective sees it and stops the run
    if count == 1 or largest * count <= 1 or not (np.diag(gram) > 0).any():
        return uniform
    problem = _Problem.scaled(np.asarray(gram, np.float64), largest)
    return problem.enumerated() if count <= ENUMERATED else problem.descended(uniform)


@dataclass(frozen=True)
class _Problem:
    """``min u' R u`` with ``a' u = 1`` and ``0 <= u <= C / a``; the weights are ``w = a u``.

    Attributes:
        cosines: R, inner products of the vectors divided by their norms, [T,T]; rows of zeros for vectors of norm 0.
        share: a, the shortest norm (but 0) divided by each vector's, 0 to 1, [T].
        largest: C.
    """

    cosines: Array
    share: Array
    largest: float

    @classmethod
    def scaled(cls, gram: Array, largest: float) -> _Problem:
        norms = np.sqrt(np.diag(gram).clip(0))
        shortest = norms[norms > 0].min()
        norms = np.where(norms > 0, norms, shortest)
        return cls(gram / norms[:, None] / norms, shortest / norms, largest)

    def enumerated(self) -> Array:
        """Every set of weights at a bound is tried; the best is the minimum, because it is among them."""
        candidates: list[tuple[float, float, Array]] = []  # objective, rounding of it, weights
        for bounds in self._patterns():
            weights = self._stationary(np.array(bounds))
            if weights is not None:
                candidates.append((*self._value(weights), weights))
        least = min(value for value, _, _ in candidates)
        ties = [weights for value, size, weights in candidates if value - least <= _TIE * size]
        return min(ties, key=lambda weights: float(weights @ weights))

    def descended(self, weights: Array) -> Array:
        """The minimum by an active-set method: `weights` are feasible, and every step lowers the objective."""
        bounds = np.zeros(len(weights), int)
        for _ in range(50 * len(weights)):
            aim = self._solved(bounds)
            step, blocking = self._room(weights, aim, bounds)
            weights = weights + step * (aim - weights)
            if blocking is not None:
                bounds[blocking] = _LOWER if aim[blocking] < weights[blocking] else _UPPER
                weights[blocking] = 0.0 if bounds[blocking] == _LOWER else self.largest
                continue
            freed = self._wrongly_bound(weights, bounds)
            if not freed:
                break
            bounds[freed] = _FREE
        weights = weights.clip(0, self.largest)
        return weights / weights.sum()

    def _patterns(self) -> Iterator[tuple[int, ...]]:
        """Which weights are free, at 0 and at C; those that cannot sum to 1 are left out."""
        kinds = (_FREE, _LOWER, _UPPER) if self.largest < 1 else (_FREE, _LOWER)  # one weight of 1 is a free one alone
        for bounds in itertools.product(kinds, repeat=len(self.share)):
            free, upper = bounds.count(_FREE), bounds.count(_UPPER)
            least, most = upper * self.largest, (upper + free) * self.largest
            if least <= 1 + _SLACK and most >= 1 - _SLACK and (free or upper):
                yield bounds

    def _stationary(self, bounds: NDArray[np.int_]) -> Array | None:
        """The weights at which the objective is stationary in the free ones, or None where a bound is broken."""
        weights = self._solved(bounds)
        over = np.maximum(-weights, weights - self.largest) / self.share
        if over.max() > _SLACK or abs(weights.sum() - 1) > _SLACK:
            return None
        weights = weights.clip(0, self.largest)
        return weights / weights.sum()

    def _solved(self, bounds: NDArray[np.int_]) -> Array:
        """Weights, the smallest ones that solve: free ones have equal slopes, the others are at their bounds."""
        weights = np.where(bounds == _UPPER, self.largest, 0.0)
        free = np.flatnonzero(bounds == _FREE)
        if not len(free):
            return weights
        share = self.share[free] / self.share[free].max()  # 1 at most, so that one number decides the system's rank
        system = np.zeros((len(free) + 1, len(free) + 1))
        system[:-1, :-1] = self.cosines[np.ix_(free, free)]
        system[:-1, -1] = system[-1, :-1] = share
        pull = self.cosines[free] @ (weights / self.share)
        right = np.array([*-pull, (1 - weights.sum()) / self.share[free].max()])
        left, values, rows = np.linalg.svd(system)
        rank = int((values > _RANK * values[0]).sum())
        solution = (rows[:rank].T @ ((left.T @ right)[:rank] / values[:rank]))[:-1] * self.share[free]
        if rank < len(system):
            open_ways = (rows[rank:, :-1] * self.share[free]).T
            solution = solution - open_ways @ np.linalg.lstsq(open_ways, solution, rcond=_RANK)[0]
        weights[free] = solution
        return weights

    def _value(self, weights: Array) -> tuple[float, float]:
        """The objective, and the sum of the absolute values of its terms."""
        scaled = weights / self.share
        return float(scaled @ self.cosines @ scaled), float(scaled @ np.abs(self.cosines) @ scaled)

    def _room(self, weights: Array, aim: Array, bounds: NDArray[np.int_]) -> tuple[float, int | None]:
        """The share of the way from `weights` to `aim` that no bound stops, up to 1, and the weight that stops it."""
        step, blocking = 1.0, None
        for k in np.flatnonzero(bounds == _FREE):
            over = max(-aim[k], aim[k] - self.largest) / self.share[k]
            if over > _SLACK:
                bound = 0.0 if aim[k] < weights[k] else self.largest
                possible = max((bound - weights[k]) / (aim[k] - weights[k]), 0.0) if aim[k] != weights[k] else 0.0
                if possible < step or blocking is None:
                    step, blocking = min(possible, 1.0), int(k)
        return step, blocking

    def _wrongly_bound(self, weights: Array, bounds: NDArray[np.int_]) -> list[int]:
        """The weight whose bound holds it back most; two of them where none is free; none at the minimum."""
        slopes = self.cosines @ (weights / self.share) / self.share  # of the objective in w, halved
        size = np.abs(self.cosines) @ (weights / self.share) / self.share
        lower, upper = bounds == _LOWER, bounds == _UPPER
        free = bounds == _FREE
        if free.any():
            level = float((slopes[free] * self.share[free] ** 2).sum() / (self.share[free] ** 2).sum())
            gain = np.where(lower, level - slopes, 0) + np.where(upper, slopes - level, 0)
            worst = int((gain * self.share).argmax())
            return [worst] if gain[worst] > _SLACK * max(size[worst], abs(level)) else []
        if not lower.any():
            return []
        low = int(np.flatnonzero(lower)[slopes[lower].argmin()])
        high = int(np.flatnonzero(upper)[slopes[upper].argmax()])
        return [low, high] if slopes[high] - slopes[low] > _SLACK * max(size[low], size[high]) else []
