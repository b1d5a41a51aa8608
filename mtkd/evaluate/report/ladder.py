"""The ladder of a teacher-assistant chain: what each rung is, what it keeps of the teacher, what the chain gained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mtkd.config import ENSEMBLE_PREFIX, ChainConfig, StageRef
from mtkd.evaluate.metrics import LOWER_IS_BETTER, PRIMARY_METRIC
from mtkd.evaluate.report.read import RunData, number
from mtkd.evaluate.report.table import Cell, Table, count_cell, exact_text, value_cell
from mtkd.evaluate.report.wording import DASH, metric_name, p_text, seconds_text, signed_text, verdict


@dataclass(frozen=True)
class Rung:
    """One model of the ladder; None for what is not known (yet).

    Attributes:
        learned_from: names of its teachers, none for a model at the top.
        score: the leading metric. kept: that score as a share of the teacher's (teacher / score where lower is better).
        seconds: of training. all_seconds: with the training of the assistants it needs.
        gain: how much better than the direct student, positive is better; p: corrected (Holm), as in the comparisons;
            p_at_most: it is the least that the resamples can give.
        word: better, worse or no difference shown; empty without a comparison.
    """

    name: str
    learned_from: list[str]
    parameters: int | None
    score: float | None
    kept: float | None
    seconds: float | None
    all_seconds: float | None
    gain: float | None
    p: float | None
    p_at_most: bool
    word: str


@dataclass(frozen=True)
class Ladder:
    """The chain of a run.

    Attributes:
        teacher: the scored model that stands for the teachers. direct: the control, None without one.
    """

    mode: str
    metric: str
    teacher: str
    direct: str | None
    rungs: list[Rung]


def read_ladder(run: RunData) -> Ladder | None:
    """The ladder of a run's chain as far as it is known, None for a run without one."""
    try:
        chain = ChainConfig.model_validate(run.config["chain"])
    except (KeyError, ValidationError):
        return None
    metric = _metric(run)
    teacher = chain.teacher_stage or ENSEMBLE_PREFIX + chain.names[0]
    best = _score(run, teacher, metric)
    top = [ref.model for teacher in chain.teachers if (ref := teacher.model.stage) is not None]
    names = [*top, *([] if chain.teacher_stage else [teacher]), *chain.names]
    return Ladder(
        chain.mode, metric, teacher, chain.direct_name, [_rung(run, chain, name, metric, best) for name in names]
    )


def ladder_table(ladder: Ladder) -> Table:
    """One row per model, the teachers first, the direct student last."""
    header = ["model", "learned from", "parameters", metric_name(ladder.metric), "of the teacher"]
    header += ["time", "with its assistants", "gain over direct", "p (Holm)"]
    rows = []
    for rung in ladder.rungs:
        style = {"better": "good", "worse": "bad"}.get(rung.word, "")
        share = DASH if rung.kept is None else f"{100 * rung.kept:.1f}%"
        rows.append(
            [
                Cell(rung.name, style="name"),
                Cell(", ".join(rung.learned_from) or DASH, style="wrap"),
                count_cell(rung.parameters),
                value_cell(rung.score),
                Cell(share, exact_text(rung.kept), "n"),
                Cell(seconds_text(rung.seconds), exact_text(rung.seconds), "n"),
                Cell(seconds_text(rung.all_seconds), exact_text(rung.all_seconds), "n"),
                Cell(signed_text(rung.gain), exact_text(rung.gain), f"n {style}".strip()),
                Cell(p_text(rung.p, rung.p_at_most), exact_text(rung.p), "n"),
            ]
        )
    return Table(header, rows, [], _note(ladder))


def _note(ladder: Ladder) -> str:
    lower = ladder.metric in LOWER_IS_BETTER
    share = f"{ladder.teacher}'s score / score" if lower else f"score / {ladder.teacher}'s score"
    note = f"{ladder.mode.upper()}. Of the teacher: {share}. Time: training alone."
    if ladder.direct:
        note += (
            f" Gain: {metric_name(ladder.metric)} better than {ladder.direct}, which had the same student, steps and "
        )
        note += "data, but no assistants; positive is better, and a finding only where p says so."
    return note


def _metric(run: RunData) -> str:
    """The leading metric of the run's task."""
    task = str(run.results.get("task"))
    kinds = {"classify": ["classification", "regression"], "glm-cloze": ["classification"], "glm-infill": ["masked-lm"]}
    primary = [PRIMARY_METRIC[kind] for kind in kinds.get(task, [task]) if kind in PRIMARY_METRIC]
    scored = {metric for model in run.models.values() for metric in _overall(model)}
    return next((metric for metric in primary if metric in scored), primary[0] if primary else "loss")


def _rung(run: RunData, chain: ChainConfig, name: str, metric: str, best: float | None) -> Rung:
    stage = next((s for s in run.stages if s.name == StageRef.named(name).stage), None)
    own = run.models.get(name, {}).get("parameters")
    parameters = own if isinstance(own, int) else stage.parameters if stage else None
    score = _score(run, name, metric)
    row = next((r for r in run.comparisons if _is_gain(r, name, chain.direct_name)), {})
    difference = number(row.get("difference"))
    gain = None if difference is None else -difference if row.get("metric") in LOWER_IS_BETTER else difference
    return Rung(
        name=name,
        learned_from=stage.teachers if stage else [],
        parameters=parameters,
        score=score,
        kept=_kept(score, best, metric),
        seconds=stage.seconds if stage else None,
        all_seconds=_all_seconds(run, chain, name),
        gain=gain,
        p=number(row.get("p_holm")),
        p_at_most=row.get("p_at_most") is True,
        word=verdict(row) if row else "",
    )


def _kept(score: float | None, best: float | None, metric: str) -> float | None:
    if score is None or best is None:
        return None
    above, below = (best, score) if metric in LOWER_IS_BETTER else (score, best)
    return above / below if below > 0 else None


def _all_seconds(run: RunData, chain: ChainConfig, name: str) -> float | None:
    """Training of a stage and of the chain's assistants that it learned from, directly or not."""
    stages = {stage.name: stage for stage in run.stages}
    needed, open_ = set[str](), [name] if name in chain.names else []
    while open_:
        here = open_.pop()
        if here in needed or here not in stages:
            continue
        needed.add(here)
        open_ += [teacher for teacher in stages[here].teachers if teacher in chain.assistants]
    seconds = [stages[each].seconds for each in needed]
    return sum(s for s in seconds if s is not None) if seconds and None not in seconds else None


def _is_gain(row: Mapping[str, Any], name: str, direct: str | None) -> bool:
    return (row.get("candidate"), row.get("baseline"), row.get("domain")) == (name, direct, "overall")


def _score(run: RunData, name: str, metric: str) -> float | None:
    return number(_overall(run.models.get(name, {})).get(metric))


def _overall(model: Mapping[str, Any]) -> Mapping[str, Any]:
    overall = model.get("overall")
    return overall if isinstance(overall, dict) else {}
