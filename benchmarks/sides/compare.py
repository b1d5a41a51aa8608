"""Tables of arms: accuracy over seeds, paired differences with intervals, p over test examples, Holm.

The interval of a difference is Student's over paired seeds. p is that of a paired permutation test over the test
examples, whose correctness is averaged over seeds first; Holm corrects it over the arms of a table.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Runs = Mapping[int, Sequence[float]]
"""Seed -> a value per test example: hits (0 or 1), or losses."""


@dataclass(frozen=True)
class Measure:
    """What the mean over test examples is, and how it is written."""

    title: str
    scale: float
    digits: int


ACCURACY, BITS = Measure("accuracy", 100, 2), Measure("bits per byte", 1, 3)


@dataclass(frozen=True)
class Difference:
    """An arm against another one, in units of the measure (accuracy: percentage points)."""

    mean: float
    half: float  # of the 95% interval over seeds
    p: float
    seeds: int
    digits: int = 2

    @property
    def text(self) -> str:
        low, high = self.mean - self.half, self.mean + self.half
        return f"{self.mean:+.{self.digits}f} [{low:+.{self.digits}f}, {high:+.{self.digits}f}]"


def accuracies(runs: Runs, measure: Measure = ACCURACY) -> list[float]:
    """Percent, or the value of another measure; one number per seed."""
    return [measure.scale * statistics.mean(run) for run in runs.values()]


def difference(runs: Runs, baseline: Runs, measure: Measure = ACCURACY) -> Difference | None:
    """A paired comparison over the seeds that both have; None of fewer than two."""
    from scipy import stats

    seeds = sorted(runs.keys() & baseline.keys())
    if len(seeds) < 2:
        return None
    gains = np.array([runs[seed] for seed in seeds]) - np.array([baseline[seed] for seed in seeds])  # [seeds, examples]
    over_seeds, per_example = measure.scale * gains.mean(1), gains.mean(0)
    half = float(stats.t.ppf(0.975, len(seeds) - 1) * over_seeds.std(ddof=1) / len(seeds) ** 0.5)
    test = stats.permutation_test(
        (per_example,), np.mean, permutation_type="samples", n_resamples=10_000, rng=np.random.default_rng(0)
    )
    return Difference(float(over_seeds.mean()), half, float(test.pvalue), len(seeds), measure.digits)


def corrected(
    found: Mapping[str, Runs], baseline: str, measure: Measure = ACCURACY
) -> dict[str, tuple[Difference, float]]:
    """Every other arm against the baseline, with Holm's p over all of them."""
    from mtkd.evaluate.significance import holm

    compared = {name: difference(runs, found[baseline], measure) for name, runs in found.items() if name != baseline}
    there = {name: each for name, each in compared.items() if each is not None}
    return {
        name: (each, p)
        for (name, each), p in zip(there.items(), holm([each.p for each in there.values()]), strict=True)
    }


def table(
    found: Mapping[str, Runs],
    baselines: Sequence[str],
    more: Mapping[str, Mapping[str, str]] | None = None,
    measure: Measure = ACCURACY,
) -> str:
    """A markdown table: an arm per row, a difference and p per baseline.

    Args:
        more: further columns: title -> {arm: cell}.
    """
    found = {name: runs for name, runs in found.items() if runs}
    more = more or {}
    against = {name: corrected(found, name, measure) for name in baselines if name in found}
    titles = ["arm", "seeds", f"{measure.title} (sd)"]
    titles += [title for name in against for title in (f"against {name} [95% over seeds]", "p (Holm)")]
    rows = [[*titles, *more], ["---"] * (len(titles) + len(more))]
    for arm, runs in found.items():
        means = accuracies(runs, measure)
        spread = statistics.stdev(means) if len(means) > 1 else 0.0
        row = [arm, str(len(runs)), f"{statistics.mean(means):.{measure.digits}f} ({spread:.{measure.digits}f})"]
        for compared in against.values():
            each = compared.get(arm)
            row += ["", ""] if each is None else [each[0].text, f"{each[1]:.4f}"]
        rows.append([*row, *(column.get(arm, "") for column in more.values())])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
