"""What each teacher was worth: the student of all teachers against those of `evaluate.ablate`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mtkd.config.ablation import ablated_stages
from mtkd.config.evaluate import Ablation
from mtkd.evaluate.metrics import LOWER_IS_BETTER
from mtkd.evaluate.report.read import RunData, number
from mtkd.evaluate.report.table import Cell, Table, exact_text
from mtkd.evaluate.report.wording import DASH, metric_name, p_text, seconds_text, signed_text, verdict

_WORDS = {
    ("better", False): ("helped", "good"),
    ("worse", False): ("harmed", "bad"),
    ("better", True): ("the others add", "good"),
    ("worse", True): ("better alone", "bad"),
}


@dataclass(frozen=True)
class Worth:
    """One teacher, None for what is not known (yet).

    Attributes:
        student: stage of the other student. alone: it has this teacher only; else all but this one.
        worth: how much better the student of all teachers is, positive is better whatever the metric; low, high: its
            interval; p: corrected (Holm).
        word: better, worse or no difference shown, of the student of all teachers; "" without a comparison.
        seconds: of the other student's training.
    """

    teacher: str
    student: str
    alone: bool
    metric: str
    worth: float | None
    low: float | None
    high: float | None
    p: float | None
    p_at_most: bool
    word: str
    seconds: float | None


def read_worth(run: RunData) -> list[Worth]:
    """The ablation of a run as far as it is known, in the order of its stages; [] for a run without one."""
    settings = run.config.get("evaluate")
    try:
        ablation = Ablation.model_validate(settings["ablate"] if isinstance(settings, Mapping) else None)
    except (KeyError, ValidationError):
        return []
    stages = {stage.name: stage for stage in run.stages}
    if ablation.stage not in stages:
        return []
    found = []
    for student in ablated_stages(ablation, stages[ablation.stage].teachers):
        row = next((r for r in run.comparisons if _pair(r) == (ablation.stage, student.name, "overall")), {})
        seconds = stages[student.name].seconds if student.name in stages else None
        found.append(_worth(student.teacher, student.name, student.alone, row, seconds))
    return found


def _pair(row: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    return row.get("candidate"), row.get("baseline"), row.get("domain")


def _worth(teacher: str, student: str, alone: bool, row: Mapping[str, Any], seconds: float | None) -> Worth:
    ends = [number(row.get(key)) for key in ("difference", "low", "high")]
    if row.get("metric") in LOWER_IS_BETTER:
        difference, low, high = (None if x is None else -x for x in (ends[0], ends[2], ends[1]))
    else:
        difference, low, high = ends
    return Worth(
        teacher=teacher,
        student=student,
        alone=alone,
        metric=str(row.get("metric", "")),
        worth=difference,
        low=low,
        high=high,
        p=number(row.get("p_holm")),
        p_at_most=row.get("p_at_most") is True,
        word=verdict(row) if row else "",
        seconds=seconds,
    )


def worth_table(worths: list[Worth]) -> Table:
    """One row per student of the ablation; its note says the same in words."""
    metric = metric_name(next((w.metric for w in worths if w.metric), "difference"))
    header = ["teacher", "compared with", metric, "interval", "p (Holm)", "verdict", "time"]
    rows = []
    for worth in worths:
        text, style = _WORDS.get((worth.word, worth.alone), (worth.word or DASH, "none"))
        interval = f"[{signed_text(worth.low)}, {signed_text(worth.high)}]" if worth.low is not None else DASH
        rows.append(
            [
                Cell(worth.teacher, style="name"),
                Cell("it alone" if worth.alone else "all but it"),
                Cell(signed_text(worth.worth), exact_text(worth.worth), "n"),
                Cell(interval, f"{exact_text(worth.low)}, {exact_text(worth.high)}", "n"),
                Cell(p_text(worth.p, worth.p_at_most), exact_text(worth.p), "n"),
                Cell(text, style=style),
                Cell(seconds_text(worth.seconds), exact_text(worth.seconds), "n"),
            ]
        )
    return Table(header, rows, [], " ".join([*worth_sentences(worths), _EXPLAINED]))


_EXPLAINED = (
    "Positive: the student of all teachers is better than the one it is compared with, which had the same start, the "
    "same data and as many steps (with early_stop: at most). Time: training of that other student. One seed each: "
    "another seed is another student."
)


def worth_sentences(worths: list[Worth]) -> list[str]:
    """One sentence per teacher that was compared, a claim only where the corrected p supports it."""
    sentences = []
    for worth in worths:
        if not worth.word or worth.worth is None:
            continue
        gap = f"{signed_text(worth.worth)} {metric_name(worth.metric)}, p {p_text(worth.p, worth.p_at_most)}"
        if worth.alone:
            ends = {"better": "the other teachers add to it", "worse": "it teaches better alone"}
            sentences.append(f"{worth.teacher}: {ends.get(worth.word, 'no difference from it alone shown')} ({gap}).")
        else:
            ends = {"better": "it helped", "worse": "the student is better without it"}
            sentences.append(f"{worth.teacher}: {ends.get(worth.word, 'no worth shown')} ({gap}).")
    return sentences
