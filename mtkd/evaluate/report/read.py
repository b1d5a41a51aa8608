"""A run directory read into plain data. Files that are missing or half-written leave gaps, never an exception."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtkd.config import StageRef
from mtkd.config.yamlfile import parse
from mtkd.engine.folder import RunDir
from mtkd.engine.jsonlines import VALIDATION
from mtkd.engine.notes import Agreement, Environment, Results, read_done
from mtkd.engine.record import check_digest, plain_bytes, read_record
from mtkd.engine.runyaml import own_config
from mtkd.errors import DataError, UserError, masked

# What the values of a metrics line are indexed by, rather than a curve of their own.
_INDEX = frozenset({"stage", "step", "time"})


@dataclass
class Curve:
    """One metric of one stage over optimizer steps; NaN where a logged value was not finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def cut(self, step: int) -> None:
        """Drop every point at `step` or later."""
        keep = sum(s < step for s in self.steps)
        del self.steps[keep:], self.values[keep:]

    @property
    def last(self) -> float | None:
        """The newest finite value."""
        return next((v for v in reversed(self.values) if math.isfinite(v)), None)

    @property
    def num_non_finite(self) -> int:
        return sum(not math.isfinite(v) for v in self.values)


@dataclass
class StageRecord:
    """What is known of one stage: planned, running or done.

    Attributes:
        status: ``planned``, ``running`` or ``done``.
        steps: optimizer steps made so far; `planned_steps` what the configuration asks for (None: epochs or seconds).
        exported_step: the step that became the stage's model.
        curves: metric name -> curve, without the ``validation/`` ones.
        caches: what a cache stage measured, by teacher: examples, positions, bytes, bytes_per_position, kl (nats).
        calibration: what was fitted for its teachers, by name; see `mtkd.engine.notes.Calibrated`.
        agreement: of its teachers, see `mtkd.engine.notes.Agreement`; {} where it was not measured.
        validation: metric name without ``validation/`` -> curve.
    """

    name: str
    kind: str = ""
    status: str = "planned"
    steps: int | None = None
    planned_steps: int | None = None
    exported_step: int | None = None
    parameters: int | None = None
    tokens: int | None = None
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    teachers: list[str] = field(default_factory=list)
    caches: dict[str, dict[str, Any]] = field(default_factory=dict)
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)
    agreement: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    validation: dict[str, Curve] = field(default_factory=dict)

    def per_teacher(self, prefix: str) -> dict[str, Curve]:
        """The curves ``prefix<teacher>``, by teacher."""
        return {name.removeprefix(prefix): curve for name, curve in self.curves.items() if name.startswith(prefix)}


@dataclass
class RunData:
    """A whole run directory.

    Attributes:
        config_text: run.yaml as it stands, None when there is none; `config` the same parsed.
        results: results.json, {} while there is none.
        problems: files that exist but could not be read, one sentence each.
        redone: stages that are being made again; the results are those of what they were.
    """

    name: str
    config_text: str | None
    config: dict[str, Any]
    env: dict[str, Any]
    stages: list[StageRecord]
    results: dict[str, Any]
    problems: list[str]
    redone: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, dict[str, Any]]:
        return {name: m for name, m in _mapping(self.results.get("models")).items() if isinstance(m, dict)}

    @property
    def comparisons(self) -> list[dict[str, Any]]:
        return [row for row in self.results.get("comparisons") or [] if isinstance(row, dict)]

    @property
    def answers(self) -> dict[str, Any]:
        """What models wrote, {} where none did; models, comparisons and samples as in results.json."""
        return _mapping(self.results.get("answers"))

    @property
    def every_comparison(self) -> list[dict[str, Any]]:
        """Those of scores, then those of written answers: one family."""
        written = self.answers.get("comparisons")
        return [*self.comparisons, *(row for row in written or [] if isinstance(row, dict))]

    @property
    def state(self) -> str:
        """``done`` when the results are written, ``training``, or ``evaluating`` after the last stage."""
        if self.redone:
            return "training"
        if self.results:
            return "done"
        return "evaluating" if self.stages and all(s.status == "done" for s in self.stages) else "training"


def read_run(run_dir: Path) -> RunData:
    """Everything the report shows.

    Raises:
        DataError: when `run_dir` is not a folder.
    """
    if not run_dir.is_dir():
        raise DataError("there is no run here", where="report", found=str(run_dir), todo="give the folder of a run")
    problems: list[str] = []
    text = _text(run_dir / "run.yaml", problems)
    config: dict[str, Any] = {}
    if text is not None:
        try:
            config = _mapping(parse(text, "run.yaml").plain())
        except UserError:
            problems.append("run.yaml is not valid YAML")
    redone = sorted(RunDir(run_dir).set_aside())
    if redone:
        problems.append(f"being made again, the results are those before: {', '.join(redone)}")
    return RunData(
        name=str(config.get("name") or run_dir.resolve().name),
        config_text=None if text is None else masked(text),  # an older version wrote what is refused today
        config=config,
        env=_json(run_dir / "env.json", problems),
        stages=_stages(run_dir, config, problems),
        results=_json(run_dir / "results.json", problems),
        problems=problems,
        redone=redone,
    )


def check_whole(run_dir: Path) -> None:
    """Refuse to show a run whose records are not what was written: a page without them would replace a whole one.

    Raises:
        UserError: run.yaml cannot be read. DataError: a record is damaged; with file and remedy.
    """
    run = RunDir.open(run_dir)
    own_config(run)
    again = "`mtkd run FILE` makes it again"
    for path, form in ((run.environment_file, Environment), (run_dir / "results.json", Results)):
        if path.exists():
            read_record(path, form, again)
    for path in sorted(run_dir.glob("stages/[0-9]*/DONE")):
        read_done(path)


def number(value: Any) -> float | None:
    """`value` as a float, None when it is not a number (NaN is one)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _stages(run_dir: Path, config: Mapping[str, Any], problems: list[str]) -> list[StageRecord]:
    """In the order of the configuration, then of the folders, then of the metrics."""
    records: dict[str, StageRecord] = {}
    for name, wanted in _mapping(config.get("stages")).items():
        wanted = _mapping(wanted)
        record = records[str(name)] = StageRecord(str(name), kind=str(wanted.get("kind") or ""))
        record.planned_steps = _integer(wanted.get("steps"))
        record.teachers = _teachers(wanted.get("teachers"))
    done = {}
    for folder in sorted((run_dir / "stages").glob("[0-9]*-*")):
        name = re.sub(r"^\d+-", "", folder.name)
        records.setdefault(name, StageRecord(name))
        if (folder / "calibration.json").exists():
            fitted = _mapping(_json(folder / "calibration.json", problems).get("teachers"))
            records[name].calibration = {str(teacher): dict(_mapping(facts)) for teacher, facts in fitted.items()}
        if (folder / "agreement.json").exists():
            kept = _json(folder / "agreement.json", problems)
            records[name].agreement = {key: kept[key] for key in Agreement.model_fields if key in kept}
        if (folder / "DONE").exists():
            done[name] = _json(folder / "DONE", problems)
    _read_metrics(run_dir / "metrics.jsonl", records, problems)
    for name, record in records.items():
        if name in done:
            _finish(record, done[name])
        elif record.curves:
            record.status = "running"
        if record.kind == "cache":
            record.steps = None  # what it counts are shards
    return list(records.values())


def _finish(record: StageRecord, done: Mapping[str, Any]) -> None:
    record.status = "done"
    record.kind = str(done.get("kind") or record.kind)
    record.steps = _integer(done.get("steps")) if "steps" in done else record.steps
    record.seconds = number(done.get("seconds")) if "seconds" in done else record.seconds
    record.tokens = _integer(done.get("tokens")) if "tokens" in done else record.tokens
    record.exported_step = _integer(done.get("exported_step"))
    record.parameters = _integer(done.get("parameters"))
    record.peak_memory_bytes = _integer(done.get("peak_memory_bytes"))
    record.teachers = _teachers(done.get("teachers")) or record.teachers
    record.caches = {str(name): dict(_mapping(facts)) for name, facts in _mapping(done.get("caches")).items()}


def _read_metrics(path: Path, records: dict[str, StageRecord], problems: list[str]) -> None:
    known, strange = frozenset(records), 0
    for line in _lines(path, problems):
        name, step = str(line.get("stage", "")), _integer(line.get("step"))
        if not name or step is None:
            continue
        if known and name not in known:  # a damaged name would be shown as a stage of its own
            strange += 1
            continue
        record = records.setdefault(name, StageRecord(name))
        given = {key: value for key, value in line.items() if key not in _INDEX}
        validation = {k.removeprefix(VALIDATION): v for k, v in given.items() if k.startswith(VALIDATION)}
        training = {k: v for k, v in given.items() if not k.startswith(VALIDATION)}
        if training:
            if record.steps is not None and step <= record.steps:
                # A resumed run does these steps again. What an earlier session logged beyond them is void too.
                for curve in record.curves.values():
                    curve.cut(step)
                for curve in record.validation.values():
                    curve.cut(step)
            record.steps = step
            record.seconds, record.tokens = number(training.get("seconds")), _integer(training.get("tokens"))
            _append(record.curves, step, training)
        for key in validation:
            if key in record.validation:
                record.validation[key].cut(step)
        _append(record.validation, step, validation)
    if strange:
        problems.append(f"{path.name}: {strange} lines are of no stage of this run, and were left out")


def _append(curves: dict[str, Curve], step: int, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        as_number = math.nan if value is None else number(value)
        if as_number is not None:
            curve = curves.setdefault(key, Curve())
            curve.steps.append(step)
            curve.values.append(as_number)


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    text = _text(path, problems)
    broken = 0
    lines = (text or "").splitlines()
    for position, line in enumerate(lines):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            broken += position < len(lines) - 1  # the last line may be in the middle of being written
            continue
        if isinstance(value, dict):
            yield value
    if broken:
        problems.append(f"{path.name}: {broken} unreadable lines were left out")


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is not a JSON object")
        return {}
    try:
        return {key: item for key, item in check_digest(value, path).items() if key not in ("format", "sha256")}
    except DataError as error:
        problems.append(f"{path.name} is left out: {error.message}")
        return {}


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return plain_bytes(path).decode(errors="replace")
    except FileNotFoundError:
        return None
    except DataError as error:
        problems.append(f"{path.name}: {error.message}")
        return None


def _teachers(value: Any) -> list[str]:
    """Teacher names from a list of strings or of mappings with a name."""
    names = []
    for teacher in value if isinstance(value, list) else []:
        name = teacher.get("name") if isinstance(teacher, dict) else teacher
        ref = StageRef.parse(str(name))
        names.append(ref.model if ref is not None else str(name or "?"))
    return names


def _integer(value: Any) -> int | None:
    as_number = number(value)
    return int(as_number) if as_number is not None and math.isfinite(as_number) else None


def _mapping(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}
