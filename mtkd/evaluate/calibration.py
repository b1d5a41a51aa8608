"""Fit a teacher's temperature on labels, and measure how well its confidence says how often it is right.

    seen = observe(rows, labels)      # a tile of logits [m,V]; what is kept of it does not depend on V
    seen = Observed.joined(parts)
    temperature = fit_temperature(seen)
    quality(seen, temperature)        # accuracy, mean confidence, cross entropy, ECE, reliability bins

The cross entropy at an inverse temperature b is ``mean(L(b) + b gap)``, where L is the logsumexp of the logits below
their largest one and gap is how far the label's logit is below it. L is smooth in ``log b``: its value and two
derivatives at 18 nodes, kept per position, give it between them to about 1e-6 nats. So one pass over the teacher's
logits is enough for any number of temperatures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtkd.models.calibrated import Calibration
from mtkd.models.classes import LOW

# Inverse temperatures 2 ** (j / 2), 1 among them: temperatures from 0.044 to 16. Beyond, a teacher of a real task is
# broken, or is right on every label and has no best temperature.
_EXPONENTS = np.arange(-8, 10) / 2
NODES = _EXPONENTS * math.log(2)  # log of the inverse temperature
COLDEST, HOTTEST = 2 ** -float(_EXPONENTS[-1]), 2 ** -float(_EXPONENTS[0])
_LOWEST = -1e5  # stands for -inf: e to this power is 0 at every node, and 0 times it is 0
BINS = 10


@dataclass(frozen=True)
class Observed:
    """What is kept of n labelled positions.

    Attributes:
        gaps: largest logit minus the label's, [n].
        right: whether the label's is the largest, [n] bool.
        curves: at each node L and its first two derivatives by the log of the inverse temperature, [n,nodes,3].
    """

    gaps: NDArray[np.float64]
    right: NDArray[np.bool_]
    curves: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.gaps)

    @classmethod
    def joined(cls, parts: Sequence[Observed]) -> Observed:
        """All positions of several."""
        empty = cls(np.zeros(0), np.zeros(0, bool), np.zeros((0, len(NODES), 3)))
        each = [empty, *parts]
        return cls(*(np.concatenate([getattr(part, name) for part in each]) for name in ("gaps", "right", "curves")))


def outputs(rows: Tensor) -> Tensor:
    """Which columns a teacher has outputs for, [m,V] bool: of a specialist not all.

    The logits of the others are `mtkd.models.classes.LOW` below its own, at no temperature a label's. A row that is not
    finite has all columns, so that it is told where it is read.
    """
    largest = rows.max(-1, keepdim=True).values
    return ~((rows < largest - LOW / 2) & largest.isfinite())


def knows(rows: Tensor, labels: Tensor) -> Tensor:
    """Whether a teacher has an output for each label, [m] bool: a specialist is not asked about other classes."""
    return outputs(rows).gather(-1, labels[:, None]).squeeze(-1)


def observe(rows: Tensor, labels: Tensor) -> Observed:
    """Keep what calibration needs of some logits.

    Args:
        rows: logits, [m,V]; -inf for a column without a chance.
        labels: their columns, [m].
    Raises:
        ValueError: a logit is NaN or +inf.
    """
    largest = rows.max(-1, keepdim=True).values
    if not bool(largest.isfinite().all()):  # of a row with NaN it is NaN
        raise ValueError("a logit is not finite")
    below = (rows.double() - largest).clamp_min(_LOWEST)  # [m,V]
    squares, curves = below.square(), rows.new_zeros(len(rows), len(NODES), 3, dtype=torch.float64)
    for start in (0, 1):  # two nodes on, the inverse temperature is twice as large: squares instead of exponentials
        powers = (below * math.exp(NODES[start])).exp()
        for node in range(start, len(NODES), 2):
            total = powers.sum(-1)
            first = torch.linalg.vecdot(powers, below) / total
            second = torch.linalg.vecdot(powers, squares) / total
            b = math.exp(NODES[node])
            curves[:, node, 0] = total.log()
            curves[:, node, 1] = b * first
            curves[:, node, 2] = b * first + b * b * (second - first.square())
            powers.square_()
    gaps = -below.gather(-1, labels[:, None]).squeeze(-1)
    right = rows.argmax(-1) == labels  # of equal columns one is chosen, as for the accuracy of a score
    return Observed(gaps.cpu().numpy(), right.cpu().numpy(), curves.cpu().numpy())


def fit_temperature(seen: Observed) -> float:
    """The temperature with the least mean cross entropy, from `COLDEST` to `HOTTEST`.

    The cross entropy is convex in the inverse temperature, so the zero of its derivative is the only minimum.
    """
    from scipy.interpolate import BPoly
    from scipy.optimize import brentq

    gap = float(seen.gaps.mean())
    slope = BPoly.from_derivatives(NODES, seen.curves.mean(0)).derivative()

    def rise(s: float) -> float:
        return float(slope(s)) + math.exp(s) * gap

    if rise(NODES[0]) >= 0:
        return HOTTEST
    if rise(NODES[-1]) <= 0:
        return COLDEST
    return math.exp(-float(brentq(rise, NODES[0], NODES[-1], xtol=1e-10)))


def fit_with_bias(rows: NDArray[np.float64], labels: NDArray[np.int64]) -> Calibration:
    """Temperature and a bias per class with the least cross entropy, plus ``sum(bias^2) / 2`` over all n labels.

    That prior (a standard deviation of 1 nat) is for classes with few labels: of one without any, the best bias would
    be minus infinity.

    Args:
        rows: logits, [n,C]. labels: [n].
    """
    from scipy.optimize import minimize

    count, classes = rows.shape
    truth = np.eye(classes)[labels]  # [n,C]

    def loss(values: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        b, bias = math.exp(values[0]), values[1:]
        logits = b * rows + bias
        logits -= logits.max(-1, keepdims=True)
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        wrong = (np.exp(log_probs) - truth) / count
        value = -float((truth * log_probs).sum()) / count + float(bias @ bias) / (2 * count)
        return value, np.concatenate([[b * float((wrong * rows).sum())], wrong.sum(0) + bias / count])

    rows = np.maximum(rows - rows.max(-1, keepdims=True), _LOWEST)
    start = np.zeros(1 + classes)
    start[0] = -math.log(fit_temperature(observe(torch.from_numpy(rows), torch.from_numpy(labels))))
    bounds = [(float(NODES[0]), float(NODES[-1])), *[(None, None)] * classes]
    found: NDArray[np.float64] = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-9}
    ).x
    return Calibration(math.exp(-found[0]), tuple(found[1:].tolist()))


def quality(seen: Observed, temperature: float) -> dict[str, Any]:
    """What a temperature makes of a teacher.

    Returns:
        cross_entropy (nats per label), confidence (mean largest probability), accuracy, ece (expected calibration error
        over 10 bins of equal width), bins: [[mean confidence, accuracy, positions], ...] without empty ones.
    """
    sums = _curve_at(seen, -math.log(temperature))
    losses, confidence = sums + seen.gaps / temperature, np.exp(-sums)
    number = np.clip((confidence * BINS).astype(int), 0, BINS - 1)
    bins = [
        [float(confidence[here].mean()), float(seen.right[here].mean()), int(here.sum())]
        for here in (number == each for each in range(BINS))
        if here.any()
    ]
    return {
        "cross_entropy": float(losses.mean()),
        "confidence": float(confidence.mean()),
        "accuracy": float(seen.right.mean()),
        "ece": sum(abs(sure - right) * count for sure, right, count in bins) / len(seen),
        "bins": bins,
    }


def _curve_at(seen: Observed, s: float) -> NDArray[np.float64]:
    """L at a log of the inverse temperature, [n], between its nodes."""
    from scipy.interpolate import BPoly

    left = int(np.clip(np.searchsorted(NODES, s) - 1, 0, len(NODES) - 2))
    if s == NODES[left + 1]:
        return seen.curves[:, left + 1, 0]
    ends = [list(np.moveaxis(seen.curves[:, node], -1, 0)) for node in (left, left + 1)]
    found: NDArray[np.float64] = BPoly.from_derivatives(NODES[left : left + 2], ends)(s)
    return np.maximum(found, 0.0)  # the largest probability is at most 1
