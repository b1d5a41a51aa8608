"""Numbers and verdicts in words, the same in the terminal, in JSON and on the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mtkd.evaluate.metrics import LOWER_IS_BETTER
from mtkd.evaluate.report.read import RunData, number

DASH = "–"
MINUS = "−"

METRIC_NAMES = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "loss": "nats per target",
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
    "exact_match": "exact match",
    "rouge_l": "ROUGE-L",
    "length": "tokens written",
    "cut": "share cut",
    "removed_share": "share of removed ids",
}

# At which share of equal choices which advice is given; the largest that is reached. From the tables of
# benchmarks/README.md: teachers that agreed in 96% and 97% of the cases were worth no more than one of them. Of eight
# that agreed in 85%, weights by confidence made 0.2 points more than equal ones, in 57% 1.7, in 29% 5.8.
_ADVICE = (
    (0.95, "expect one of them to do as well"),
    (0.60, "expect little of weights, compare with the best one alone"),
    (0.0, "weights matter, consider abstain (specialists), confidence, ca_mkd (with labels) or posterior (texts)"),
)
# Nats. Below, choices differ because no teacher is sure of any: barely trained models of tests are 0.002 apart.
_NEAR = 0.01
_UNSURE = "their distributions hardly differ, for they are unsure: weights change little"


def agreement_text(found: Mapping[str, Any]) -> str:
    """How far the teachers of a stage agree, with advice; "" where it is not known.

    Args:
        found: a `mtkd.engine.notes.Agreement`.
    """
    same, cases, pairs = number(found.get("same")), number(found.get("cases")), found.get("divergence")
    apart = [x for x in map(number, pairs.values()) if x is not None] if isinstance(pairs, dict) else []
    if same is None or cases is None or not apart:
        return ""
    advice = next((words for least, words in _ADVICE if same >= least), _ADVICE[-1][1])
    mean = sum(apart) / len(apart)
    if same < _ADVICE[0][0] and mean < _NEAR:
        advice = _UNSURE
    return (
        f"these teachers agree in {same:.0%} of {cases:,.0f} cases (Jensen-Shannon divergence "
        f"{mean:.3f} nats, mean of pairs): {advice}"
    )


def metric_name(metric: Any) -> str:
    return METRIC_NAMES.get(str(metric), str(metric))


def value_text(value: Any) -> str:
    """A metric with four significant digits (more before the point when it is large)."""
    x = number(value)
    if x is None or math.isnan(x):
        return DASH
    if math.isinf(x):
        return "∞" if x > 0 else MINUS + "∞"
    if x == 0:
        return "0"
    if abs(x) >= 1e6 or abs(x) < 1e-4:
        return f"{x:.3g}".replace("-", MINUS)
    decimals = max(0, 3 - math.floor(math.log10(abs(x))))
    return f"{x:,.{min(decimals, 6)}f}".replace("-", MINUS)


def signed_text(value: Any) -> str:
    """A difference with its sign and four decimals (significant digits below 0.001)."""
    x = number(value)
    if x is None or not math.isfinite(x):
        return DASH
    digits = f"{abs(x):.4f}" if abs(x) >= 1e-3 or x == 0 else f"{abs(x):.2g}"
    return (MINUS if x < 0 else "+" if x > 0 else "") + digits


def p_text(value: Any, at_most: Any = False) -> str:
    """A p-value.

    Args:
        at_most: it is the least that the resamples can give.
    """
    x = number(value)
    if x is None or not math.isfinite(x):
        return DASH
    if x <= 1e-300:
        return "< 1e-300"
    text = f"{x:.0e}" if x < 5e-5 else f"{x:.4f}" if x < 0.1 else f"{x:.2f}"
    return f"≤ {text}" if at_most is True and x < 1 else text


def count_text(value: Any) -> str:
    """12,345,678 as 12.3 M."""
    x = number(value)
    if x is None or not math.isfinite(x):
        return DASH
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(x) >= size:
            return f"{x / (1e3 if unit == 'k' else size):.3g} {unit}"
    return f"{x:,.0f}"


def bytes_text(value: Any) -> str:
    x = number(value)
    if x is None or not math.isfinite(x):
        return DASH
    return f"{x / 2**30:.2f} GiB" if x >= 2**30 else f"{x / 2**20:.0f} MiB"


def seconds_text(value: Any) -> str:
    x = number(value)
    if x is None or not math.isfinite(x):
        return DASH
    if x < 60:
        return f"{x:.1f} s"
    minutes, seconds = divmod(round(x), 60)
    return f"{minutes} min {seconds:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def interval_text(row: Mapping[str, Any]) -> str:
    return f"[{signed_text(row.get('low'))}, {signed_text(row.get('high'))}]"


def confidence_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """``95%``, as the rows say it."""
    levels = {f"{100 * x:g}%" for x in (number(row.get("confidence")) for row in rows) if x is not None}
    return "/".join(sorted(levels)) or "95%"


def verdict(row: Mapping[str, Any]) -> str:
    """``better``, ``worse`` or ``no difference shown``."""
    return {True: "better", False: "worse"}.get(row.get("better"), "no difference shown")  # type: ignore[arg-type]


def sentence(row: Mapping[str, Any]) -> str:
    """What one comparison showed, honestly: a claim only when the corrected p-value supports it."""
    candidate, baseline, metric = row.get("candidate"), row.get("baseline"), metric_name(row.get("metric"))
    gap, base = number(row.get("difference")), number(row.get("baseline_value"))
    values = f"{value_text(row.get('candidate_value'))} against {value_text(row.get('baseline_value'))}"
    where = "" if row.get("domain") == "overall" else f" on {row.get('domain')}"
    floor = row.get("p_at_most")
    equals = "≤" if floor is True else "="
    evidence = (
        f"difference {signed_text(gap)}, {confidence_text([row])} interval {interval_text(row)}, "
        f"p {equals} {p_text(row.get('p'))}, corrected {p_text(row.get('p_holm'), floor)}, "
        f"{count_text(row.get('n'))} documents"
    )
    if row.get("better") is None or gap is None:
        return f"No difference shown between {candidate} and {baseline}{where} in {metric}: {values} ({evidence})."
    share = ""
    if row.get("metric") in LOWER_IS_BETTER and base and math.isfinite(base):  # a ratio scale: a share means something
        share = f", {100 * abs(gap / base):.1f}% {'less' if gap < 0 else 'more'}"
    verb = "better" if row.get("better") else "worse"
    return f"{candidate} is {verb} than {baseline}{where}: {values} {metric}{share} ({evidence})."


def headline(run: RunData) -> list[tuple[str, str]]:
    """(verdict, sentence) per overall comparison, in the order they were asked for."""
    return [(verdict(row), sentence(row)) for row in run.every_comparison if row.get("domain") == "overall"]


def nothing_to_compare(run: RunData) -> str:
    """What stands in the headline's place when there are no comparisons."""
    if run.models:
        return "The models were scored, but no comparisons were asked for (evaluate.comparisons)."
    left = sum(stage.status != "done" for stage in run.stages)
    if run.state == "training":
        return f"The run is in progress: {left} of {len(run.stages)} stages are not finished. There are no results yet."
    return "All stages are finished; there is no results.json. `mtkd run` scores their models and trains nothing again."
