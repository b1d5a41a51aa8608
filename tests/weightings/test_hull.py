"""The smallest vector in a hull, against rational arithmetic, closed forms and the optimality conditions."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from mtkd.weightings.hull import ENUMERATED, smallest_norm

Array = NDArray[np.float64]
Rational = list[Fraction]


def solved(matrix: list[Rational], right: Rational) -> Rational | None:
    """A linear system in exact arithmetic, by Gauss and Jordan; None where it is singular."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(len(rows)):
        pivot = next((k for k in range(i, len(rows)) if rows[k][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [value / rows[i][i] for value in rows[i]]
        for k in range(len(rows)):
            if k != i:
                rows[k] = [x - rows[k][i] * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[-1] for row in rows]


def exact_minimum(vectors: list[Rational], largest: Fraction) -> Rational:
    """The minimum by trying every set of bounds, in rational numbers, of independent vectors."""
    count, one = len(vectors), Fraction(1)
    gram = [[sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0)) for b in vectors] for a in vectors]
    best: tuple[Fraction, Rational] | None = None
    for kinds in itertools.product((0, 1, 2), repeat=count):  # at 0, at the largest, free
        weights = [largest if kind == 1 else Fraction(0) for kind in kinds]
        free = [k for k in range(count) if kinds[k] == 2]
        if free:
            system = [[gram[i][j] for j in free] + [one] for i in free] + [[one] * len(free) + [Fraction(0)]]
            pulls = [-sum((gram[i][j] * weights[j] for j in range(count)), Fraction(0)) for i in free]
            found = solved(system, [*pulls, one - sum(weights)])
            if found is None:
                continue
            for i, value in zip(free, found, strict=False):
                weights[i] = value
        if sum(weights) != 1 or min(weights) < 0 or max(weights) > largest:
            continue
        value = sum((weights[i] * gram[i][j] * weights[j] for i in range(count) for j in range(count)), Fraction(0))
        if best is None or value < best[0]:
            best = value, weights
    assert best is not None
    return best[1]


@pytest.mark.parametrize("ratio", [1.0, 1e2, 1e4, 1e6, 1e9])
def test_orthogonal_gradients_of_any_norms_weigh_by_their_inverse_squares(ratio: float) -> None:
    """w_k ~ 1/|g_k|^2: norms of 1, 1e-4 and 2e-4 give (0, 0.8, 0.2)."""
    gram = np.diag([1.0, ratio**-2, 4 * ratio**-2])
    wanted = 1 / np.diag(gram)
    np.testing.assert_allclose(smallest_norm(gram, 1.0), wanted / wanted.sum(), rtol=1e-9)
    for scale in (1e-60, 1e60):  # nothing depends on the unit of a loss
        np.testing.assert_allclose(smallest_norm(gram * scale, 1.0), wanted / wanted.sum(), rtol=1e-9)


@pytest.mark.parametrize("largest", [Fraction(1), Fraction(3, 5), Fraction(2, 5)])
def test_small_cases_equal_rational_arithmetic(largest: Fraction) -> None:
    """Norms from 1 to 1e-5, every support of up to four vectors: the weights of an exact solution."""
    random, supports = np.random.default_rng(3), set[tuple[bool, ...]]()
    for trial in range(24):
        count = 3 + trial % 2
        whole = random.integers(-9, 10, (count, 6)) + (4 if trial % 3 else 0)
        tens = random.integers(0, 6, count)
        vectors = [[Fraction(int(x), 10 ** int(ten)) for x in row] for row, ten in zip(whole, tens, strict=True)]
        gram = np.array([[float(sum(x * y for x, y in zip(a, b, strict=True))) for b in vectors] for a in vectors])
        wanted = exact_minimum(vectors, largest)
        np.testing.assert_allclose(smallest_norm(gram, float(largest)), [float(w) for w in wanted], atol=1e-8)
        supports.add(tuple(w > 0 for w in wanted))
    assert len(supports) > 4  # not always the same bounds


def excess(gram: Array, weights: Array, largest: float) -> float:
    """How far the weights are from the minimum, as a share of the objective: the gap of Frank and Wolfe.

    The best feasible corner in the direction of the slope bounds what any other weights could gain.
    """
    slope, left, corner = gram @ weights, 1.0, np.zeros(len(weights))
    for k in np.argsort(slope):
        corner[k] = min(largest, left)
        left -= corner[k]
    return float(slope @ (weights - corner) / (weights @ gram @ weights))


@pytest.mark.parametrize("count", [2, 3, ENUMERATED, ENUMERATED + 1, 10, 14])
@pytest.mark.parametrize("largest", [1.0, 0.6, 0.3, 0.15])
def test_no_other_weights_are_better(count: int, largest: float) -> None:
    """The optimality conditions, for norms between 1 and 1e-4, within the bounds, on both sides of the enumeration."""
    random = np.random.default_rng(count)
    for _ in range(8 if count == ENUMERATED else 25):
        vectors = (random.normal(size=(count, count + 4)) + 0.7) * 10.0 ** random.uniform(-4, 0, (count, 1))
        gram = vectors @ vectors.T
        weights = smallest_norm(gram, largest)
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        assert weights.min() >= 0
        assert weights.max() <= max(largest, 1 / count) + 1e-12
        if largest * count > 1:
            assert excess(gram, weights, largest) < 1e-6


@pytest.mark.parametrize("count", [4, 8])
def test_the_order_of_vectors_does_not_matter(count: int) -> None:
    """Vectors in another order have the same weights in that order."""
    random = np.random.default_rng(count)
    vectors = random.normal(size=(count, 5)) * 10.0 ** random.uniform(-3, 0, (count, 1))
    order, gram = random.permutation(count), vectors @ vectors.T + np.diag(np.diag(vectors @ vectors.T)) / 10
    for largest in (1.0, 0.4):
        moved = smallest_norm(gram[np.ix_(order, order)], largest)
        np.testing.assert_allclose(moved, smallest_norm(gram, largest)[order], atol=1e-9)


@pytest.mark.parametrize("others", [1, 5, 9])  # enumerated, and not
def test_equal_gradients_share_their_weight(others: int) -> None:
    """A gradient given twice has its weight in two halves; with C = 1 a gradient of norm 0 takes all."""
    random = np.random.default_rng(others)
    vectors = random.normal(size=(others + 1, others + 3))
    single, double = smallest_norm(vectors @ vectors.T, 1.0), np.concatenate([vectors[:1], vectors])
    found = smallest_norm(double @ double.T, 1.0)
    np.testing.assert_allclose(found, [single[0] / 2, single[0] / 2, *single[1:]], atol=1e-8)
    vectors[1] = 0
    np.testing.assert_allclose(smallest_norm(vectors @ vectors.T, 1.0), np.eye(others + 1)[1], atol=1e-12)
    assert smallest_norm(vectors @ vectors.T, 0.6)[1] == pytest.approx(0.6)


def test_vectors_on_one_line() -> None:
    """Of one direction: the shortest, up to C. Of both: they cancel, and the most even of such weights is taken."""
    for shortest in (1e-1, 1e-5):
        same = np.outer([1.0, shortest, 0.5], [1.0, shortest, 0.5])
        np.testing.assert_allclose(smallest_norm(same, 1.0), [0, 1, 0], atol=1e-9)
        np.testing.assert_allclose(smallest_norm(same, 0.6), [0, 0.6, 0.4], atol=1e-9)
    both = np.outer([1.0, -1e-4], [1.0, -1e-4])
    np.testing.assert_allclose(smallest_norm(both, 1.0), np.array([1e-4, 1]) / 1.0001, rtol=1e-9)
    even = np.outer([1.0, 1.0, -1.0], [1.0, 1.0, -1.0])  # all (a, 1/2 - a, 1/2) cancel
    np.testing.assert_allclose(smallest_norm(even, 1.0), [0.25, 0.25, 0.5], atol=1e-9)


def test_one_vector_no_vectors_and_no_numbers() -> None:
    """One has weight 1; zeros are uniform; a Gram matrix that is not finite gives no weights at all."""
    assert smallest_norm(np.array([[7.0]]), 0.1).tolist() == [1.0]
    assert smallest_norm(np.zeros((3, 3)), 1.0).tolist() == [1 / 3] * 3
    for bad in (np.nan, np.inf):
        for largest in (1.0, 0.6, 0.3):
            assert np.isnan(smallest_norm(np.diag([1.0, bad, 2.0]), largest)).all()
