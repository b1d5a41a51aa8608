"""The end-of-run tables for a terminal, and the same facts as strict JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mtkd.engine.jsonlines import WEIGHT
from mtkd.evaluate.report.answers import answers_table
from mtkd.evaluate.report.html import caches_table, calibration_table, comparison_table, results_table, stages_table
from mtkd.evaluate.report.ladder import ladder_table, read_ladder
from mtkd.evaluate.report.read import Curve, RunData, StageRecord, read_run
from mtkd.evaluate.report.table import Table
from mtkd.evaluate.report.wording import headline, nothing_to_compare
from mtkd.evaluate.report.worth import read_worth, worth_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

_STYLES = {
    "good": "bold green",
    "bad": "bold red",
    "best": "bold green",
    "name": "bold",
    "running": "bold blue",
    "better": "green",
    "worse": "red",
}
# Kept on the page only: a terminal is narrow.
_LEFT_OUT = {
    "Stages": {"kind", "target tokens", "peak memory"},
    "Caches": {"predictions"},
    "Calibration": {"fitted on", "bias"},
    "Results": {"kind", "parameters", "steps", "time"},
    "Answers": set(),
    "Ladder": {"learned from"},
    "What each teacher was worth": set(),
    "Comparisons": {"value", "of baseline", "metric", "test", "p", "documents"},
}
_SHORT = {
    "bits per byte": "bits/byte",
    "perplexity": "ppl",
    "nats per target": "nats",
    "parameters": "params",
    "share of removed ids": "removed",
    "validation loss": "val loss",
    "difference": "diff.",
    "p (Holm)": "p Holm",
    "with its assistants": "with assistants",
    "gain over direct": "gain",
    "bytes per prediction": "bytes each",
    "KL of the reconstruction (nats)": "KL, nats",
}
# Characters of a column of words that are kept together on a narrow terminal: of the first column, of the others.
_FIRST_WIDTH, _WIDTH = 16, 10


def terminal_tables(run_dir: Path) -> list[RichTable]:
    """Stages, caches, results, comparisons and the headline in words, those there are; the last has no title.

    Raises:
        DataError: `run_dir` is not a folder.
    """
    run = read_run(Path(run_dir))
    tables = []
    if run.stages:
        tables.append(_rich("Stages", stages_table(run.stages)))
    if caches := caches_table(run.stages):
        tables.append(_rich("Caches", caches))
    if calibration := calibration_table(run.stages):
        tables.append(_rich("Calibration", calibration))
    if run.models:
        tables.append(_rich("Results", results_table(run.models)))
    if ladder := read_ladder(run):
        tables.append(_rich("Ladder", ladder_table(ladder)))
    if worths := read_worth(run):
        tables.append(_rich("What each teacher was worth", worth_table(worths)))
    if answers := answers_table(run):
        tables.append(_rich("Answers", answers))
    if rows := run.every_comparison:
        # the metric is named where there are several
        left_out = _LEFT_OUT["Comparisons"] - ({"metric"} if len({row.get("metric") for row in rows}) > 1 else set())
        tables.append(_rich("Comparisons", comparison_table(rows), left_out))
    if headline(run):
        tables.append(_headline(run))
    return tables


def summary(run_dir: Path) -> dict[str, Any]:
    """The run as plain data that any JSON reader accepts (values that are not finite become null).

    Returns:
        run, state (training, evaluating or done), headline (sentences), stages, models and comparisons as in
        results.json, the ladder of a chain, the worth of teachers, problems.

    Raises:
        DataError: `run_dir` is not a folder.
    """
    run = read_run(Path(run_dir))
    facts: dict[str, Any] = _strict(
        {
            "run": run.name,
            "state": run.state,
            "headline": _sentences(run),
            "stages": [_stage(stage) for stage in run.stages],
            "models": run.models,
            "ladder": asdict(ladder) if (ladder := read_ladder(run)) else None,
            "worth": [asdict(worth) for worth in read_worth(run)],
            "comparisons": run.comparisons,
            "answers": run.answers or None,
            "problems": run.problems,
        }
    )
    return facts


def _sentences(run: RunData) -> list[str]:
    return [text for _, text in headline(run)] or [nothing_to_compare(run)]


def _stage(stage: StageRecord) -> dict[str, Any]:
    return {
        "name": stage.name,
        "kind": stage.kind,
        "status": stage.status,
        "steps": stage.steps,
        "planned_steps": stage.planned_steps,
        "parameters": stage.parameters,
        "tokens": stage.tokens,
        "seconds": stage.seconds,
        "peak_memory_bytes": stage.peak_memory_bytes,
        "teachers": stage.teachers,
        "caches": stage.caches,
        "calibration": stage.calibration,
        "agreement": stage.agreement,
        "loss": stage.curves.get("loss", Curve()).last,
        "validation_loss": stage.validation.get("loss", Curve()).last,
        "weights": {name: curve.last for name, curve in stage.per_teacher(WEIGHT).items()},
    }


def _rich(title: str, data: Table, left_out: set[str] | None = None) -> RichTable:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    left_out = _LEFT_OUT[title] if left_out is None else left_out
    table = RichTable(
        title=title,
        title_justify="left",
        title_style="bold",
        caption=data.note or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    groups = [name for name, columns in data.groups for _ in range(columns)] or [""] * len(data.header)
    shown = [i for i, name in enumerate(data.header) if name not in left_out]
    for i in shown:
        heading = "\n".join(part for part in (groups[i], _SHORT.get(data.header[i], data.header[i])) if part)
        longest = max((len(row[i].text) for row in data.rows), default=0)
        table.add_column(
            Text(heading),
            justify="right" if data.numeric[i] else "left",
            overflow="fold",
            no_wrap=data.numeric[i],
            min_width=min(longest, _WIDTH if i else _FIRST_WIDTH),
        )
    for row in data.rows:
        texts = []
        for i in shown:
            style = next((_STYLES[s] for s in row[i].style.split(" ") if s in _STYLES), "")
            texts.append(Text(row[i].text, style=style))  # Text, not markup: names may hold brackets
        table.add_row(*texts)
    return table


def _headline(run: RunData) -> RichTable:
    from rich.table import Table as RichTable
    from rich.text import Text

    table = RichTable.grid(padding=(0, 0, 1, 1))
    for word, text in headline(run):
        table.add_row(Text(text, style=_STYLES.get(word, "")))
    return table


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
