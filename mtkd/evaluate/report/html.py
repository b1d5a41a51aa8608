"""The report page: tables as plain data, filled into one template with autoescape on. No network, no scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtkd.engine.jsonlines import VALIDATION
from mtkd.engine.notes import file_digest
from mtkd.engine.record import Checked, read_record, write_atomic, write_record
from mtkd.errors import DataError, UserError
from mtkd.evaluate.metrics import COUNTS, HIGHER_IS_BETTER, LOWER_IS_BETTER
from mtkd.evaluate.report.answers import answers_table, answers_text, samples_of
from mtkd.evaluate.report.ladder import ladder_table, read_ladder
from mtkd.evaluate.report.plots import draw_plots
from mtkd.evaluate.report.read import RunData, StageRecord, number, read_run
from mtkd.evaluate.report.table import Cell, Table, count_cell, exact_text, value_cell
from mtkd.evaluate.report.wording import (
    DASH,
    agreement_text,
    bytes_text,
    confidence_text,
    count_text,
    headline,
    interval_text,
    metric_name,
    nothing_to_compare,
    p_text,
    seconds_text,
    signed_text,
    value_text,
    verdict,
)
from mtkd.evaluate.report.worth import read_worth, worth_table

NOTE = ".report.json"
"""What the page shows, and its digest."""

# Candidates' verdicts as style classes of the page.
_CLASSES = {"better": "good", "worse": "bad"}


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` and ``plots/*.png`` into the run directory; a run in progress is shown as far as it is.

    Returns:
        The path of the page.
    Raises:
        DataError: `run_dir` is not a folder.
        UserError: page or pictures cannot be written.
    """
    run_dir = Path(run_dir)
    run = read_run(run_dir)
    target = run_dir / "report.html"
    try:
        page = render(run, run_dir / "plots")
        write_atomic(target, page)  # a browser never sees half a page
        write_record(run_dir / NOTE, {"shown": what_is_shown(run_dir), "page": file_digest(target)})
    except OSError as error:
        raise UserError(
            f"the report cannot be written: {error.strerror or error}",
            where=str(error.filename2 or error.filename or target),
            todo="remove what stands there, or give mtkd the right to write it; `mtkd status` shows the run",
        ) from None
    return target


def is_current(run_dir: Path) -> bool:
    """Whether the report is as it was written, and shows what the run is now: drawing takes seconds."""
    try:
        note = read_record(run_dir / NOTE, _Note, old=False)
    except (FileNotFoundError, DataError):
        return False
    page = file_digest(run_dir / "report.html")
    return bool(page) and note["page"] == page and note["shown"] == what_is_shown(run_dir)


def what_is_shown(run_dir: Path) -> dict[str, str]:
    """Digests of the files that a report is made of."""
    files = [run_dir / name for name in ("run.yaml", "metrics.jsonl", "results.json")]
    for name in ("DONE", "calibration.json", "agreement.json"):
        files += sorted(run_dir.glob(f"stages/[0-9]*/{name}"))
    return {str(file.relative_to(run_dir)): file_digest(file) for file in files}


class _Note(Checked):
    shown: dict[str, str]
    page: str


def render(run: RunData, plots_folder: Path) -> str:
    """The page as text; figures are also written below `plots_folder`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    plots = draw_plots(run, plots_folder)
    # Matplotlib has escaped the names inside its figures; everything else on the page is escaped by the template.
    figures = [(p.name, p.caption, Markup(p.svg)) for p in plots.values()]
    weighted = [
        (stage.name, found)
        for position, stage in enumerate(run.stages)
        if (found := [f for f in figures if f[0] == f"weights-{position + 1:02d}"])
    ]
    ladder, worths = read_ladder(run), read_worth(run)
    return environment.get_template("template.html.j2").render(
        run=run,
        headline=[(_CLASSES.get(word, "none"), text) for word, text in headline(run)],
        nothing=nothing_to_compare(run),
        stages=stages_table(run.stages) if run.stages else None,
        caches=caches_table(run.stages),
        calibration=calibration_table(run.stages),
        reliability=[f for f in figures if f[0].startswith("reliability-")],
        agreements=[(stage.name, text) for stage in run.stages if (text := agreement_text(stage.agreement))],
        curves=[f for f in figures if f[0] in ("validation", "training")],
        weighted=weighted,
        comparisons=comparison_table(run.every_comparison) if run.every_comparison else None,
        differences=[f for f in figures if f[0].startswith("differences-")],
        ladder=ladder_table(ladder) if ladder else None,
        worth=worth_table(worths) if worths else None,
        results=results_table(run.models) if run.models else None,
        answers=answers_table(run),
        answered=answers_text(run),
        samples=samples_of(run),
        scored=_scored(run),
        warnings=[*run.problems, *_non_finite(run.stages)],
        env=sorted(_flat(run.env)),
    )


def stages_table(stages: Sequence[StageRecord]) -> Table:
    """One row per stage, as far as it has come."""
    header = ["stage", "kind", "teachers", "status", "parameters", "steps", "target tokens", "time", "peak memory"]
    rows = []
    for stage in stages:
        steps = count_text(stage.steps) if stage.steps is not None else DASH
        if stage.status != "done" and stage.planned_steps is not None:
            steps = f"{stage.steps or 0} of {stage.planned_steps}"
        elif stage.exported_step not in (None, stage.steps):
            steps = f"{steps}, exported {count_text(stage.exported_step)}"
        validation = stage.validation.get("loss")
        rows.append(
            [
                Cell(stage.name, style="name"),
                Cell(stage.kind or DASH),
                Cell(", ".join(stage.teachers) or DASH, style="wrap"),
                Cell(stage.status, style=stage.status),
                count_cell(stage.parameters),
                Cell(steps, style="n"),
                count_cell(stage.tokens),
                Cell(seconds_text(stage.seconds), exact_text(stage.seconds), "n"),
                Cell(bytes_text(stage.peak_memory_bytes), exact_text(stage.peak_memory_bytes), "n"),
                value_cell(validation.last if validation else None),
            ]
        )
    return Table([*header, "validation loss"], rows, [])


def caches_table(stages: Sequence[StageRecord]) -> Table | None:
    """What every finished cache holds; None without one."""
    header = ["cache", "examples", "predictions", "size", "bytes per prediction", "KL of the reconstruction (nats)"]
    rows = [
        [
            Cell(f"{stage.name}/{teacher}", style="name"),
            count_cell(facts.get("examples")),
            count_cell(facts.get("positions")),
            Cell(bytes_text(number(facts.get("bytes"))), exact_text(facts.get("bytes")), "n"),
            value_cell(facts.get("bytes_per_position")),
            value_cell(facts.get("kl")),
        ]
        for stage in stages
        for teacher, facts in stage.caches.items()
    ]
    return Table(header, rows, []) if rows else None


def calibration_table(stages: Sequence[StageRecord]) -> Table | None:
    """How every teacher was calibrated, before -> after on the labels that it was fitted on; None without one."""
    header = ["teacher", "temperature", "bias", "labels", "accuracy", "confidence", "cross entropy (nats)"]
    header += ["calibration error", "fitted on"]
    rows = []
    for stage in stages:
        for teacher, facts in stage.calibration.items():
            pairs = {
                key: [
                    facts[when].get(key) if isinstance(facts.get(when), dict) else None for when in ("before", "after")
                ]
                for key in ("confidence", "cross_entropy", "ece")
            }
            after = facts.get("after")
            rows.append(
                [
                    Cell(f"{stage.name}/{teacher}", style="name"),
                    value_cell(facts.get("temperature")),
                    Cell("per class" if facts.get("bias") else DASH),
                    count_cell(facts.get("labels")),
                    value_cell(after.get("accuracy") if isinstance(after, dict) else None),
                    *(
                        Cell(" → ".join(map(value_text, pair)), " -> ".join(map(exact_text, pair)), "n")
                        for pair in pairs.values()
                    ),
                    Cell(f"{facts.get('data')}, {facts.get('split')}"),
                ]
            )
    return Table(header, rows, []) if rows else None


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Every comparison, with the evidence for it."""
    header = ["candidate", "baseline", "domain", "verdict", "difference", f"{confidence_text(rows)} interval"]
    header += ["p", "p (Holm)", "value", "of baseline", "metric", "documents", "test"]
    cells = []
    for row in rows:
        word = verdict(row)
        interval = ", ".join(exact_text(row.get(key)) for key in ("low", "high"))
        cells.append(
            [
                Cell(str(row.get("candidate")), style="name"),
                Cell(str(row.get("baseline"))),
                Cell(str(row.get("domain"))),
                Cell(word, style=_CLASSES.get(word, "none")),
                Cell(signed_text(row.get("difference")), exact_text(row.get("difference")), "n"),
                Cell(interval_text(row), interval, "n"),
                Cell(p_text(row.get("p"), row.get("p_at_most")), exact_text(row.get("p")), "n"),
                Cell(p_text(row.get("p_holm"), row.get("p_at_most")), exact_text(row.get("p_holm")), "n"),
                value_cell(row.get("candidate_value")),
                value_cell(row.get("baseline_value")),
                Cell(metric_name(row.get("metric"))),
                count_cell(row.get("n")),
                Cell(str(row.get("test") or DASH)),
            ]
        )
    return Table(header, cells, [])


def results_table(models: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per model; the metrics over everything, then those of every domain. The best of a column is marked."""
    columns = result_columns(models)
    groups: list[tuple[str, int]] = [("", 5)]
    for part in dict.fromkeys(part for part, _ in columns):
        groups.append((part or "overall", sum(p == part for p, _ in columns)))
    best = {column: _best(models, column) for column in columns}
    rows = []
    for name, model in models.items():
        facts = [
            Cell(name, style="name"),
            Cell(str(model.get("kind") or DASH)),
            count_cell(model.get("parameters")),
            count_cell(model.get("steps")),
            Cell(seconds_text(model.get("seconds")), exact_text(model.get("seconds")), "n"),
        ]
        for part, metric in columns:
            value = result_value(model, part, metric)
            style = "n best" if value is not None and value == best[part, metric] else "n"
            facts.append(Cell(value_text(value), exact_text(value), style))
        rows.append(facts)
    header = ["model", "kind", "parameters", "steps", "time", *(metric_name(metric) for _, metric in columns)]
    return Table(header, rows, groups if len(groups) > 2 else [])


def result_columns(models: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str]]:
    """(domain, metric) of every metric any model has; the domain "" is all documents."""
    columns: dict[tuple[str, str], None] = {}
    domains = dict.fromkeys(d for m in models.values() for d in m.get("domains") or {})
    for part in ["", *domains]:
        for model in models.values():
            for metric in _part(model, part):
                if metric not in COUNTS:
                    columns[part, str(metric)] = None
    return list(columns)


def result_value(model: Mapping[str, Any], part: str, metric: str) -> float | None:
    """A metric of a model on a domain ("" = all documents)."""
    return number(_part(model, part).get(metric))


def _part(model: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    overall = (model.get("domains") or {}).get(part) if part else model.get("overall")
    return overall if isinstance(overall, dict) else {}


def _best(models: Mapping[str, Mapping[str, Any]], column: tuple[str, str]) -> float | None:
    values = [v for m in models.values() if (v := result_value(m, *column)) is not None and v == v]
    if len(values) < 2 or column[1] not in LOWER_IS_BETTER | HIGHER_IS_BETTER:
        return None
    return min(values) if column[1] in LOWER_IS_BETTER else max(values)


def _scored(run: RunData) -> str:
    """What the numbers were measured on, in words."""
    if not run.models:
        return ""
    overall = _part(next(iter(run.models.values())), "")
    sizes = [f"{count_text(overall[key])} {key}" for key in ("documents", "bytes", "tokens") if key in overall]
    where = f"{run.results.get('split', '?')} split of {run.results.get('data', '?')} ({run.results.get('task', '?')})"
    return f"{where}: {', '.join(sizes)}" if sizes else where


def _non_finite(stages: Sequence[StageRecord]) -> list[str]:
    return [
        f"stage {stage.name}: {bad} logged values of {metric} are not finite"
        for stage in stages
        for metric, curve in (stage.curves | {VALIDATION + k: v for k, v in stage.validation.items()}).items()
        if (bad := curve.num_non_finite)
    ]


def _flat(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs = []
    for key, inner in value.items():
        if isinstance(inner, dict):
            pairs += _flat(inner, f"{prefix}{key}.")
        else:
            listed = ", ".join(map(str, inner)) if isinstance(inner, list) else str(inner)
            pairs.append((f"{prefix}{key}", listed))
    return pairs
