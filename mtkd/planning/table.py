"""Show a plan: its stages and models, as plain values and as tables."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich.table import Table

from mtkd.config import ModelConfig
from mtkd.models.info import ModelInfo
from mtkd.planning.budget import StageMemory
from mtkd.planning.calibrated import calibration_text
from mtkd.planning.dataview import PlannedData, data_tables
from mtkd.planning.spec import StageSpec, TeacherSpec
from mtkd.pool import BACKENDS

SKIPPED = "done, skipped"


@dataclass(frozen=True)
class PlannedModel:
    """A model of a stage.

    Attributes:
        role: "student", a member, or the teacher's name.
        parameters: counted on the meta device.
        backend: where a teacher's weights live; empty for trained models.
        calibration: how a teacher is calibrated; empty where it is not.
    """

    role: str
    origin: str
    architecture: str
    layers: int
    width: int
    heads: int
    parameters: int
    backend: str = ""
    calibration: str = ""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the plan.

    Attributes:
        steps, tokens: None while they depend on data or stages; tokens are an upper bound.
        memory: None where the plan does not count it.
        notes: decisions made for the user, a sentence each.
    """

    name: str
    kind: str
    state: str
    needs: list[str]
    models: list[PlannedModel]
    rows: list[str]
    steps: int | None
    tokens: int | None
    memory: StageMemory | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of a run.

    Attributes:
        missing: models and data that are not here, each with the way to get it.
        precision: the precision, its reason, and a warning where it is slow here.
    """

    name: str
    folder: str
    engine: str
    command: str
    stages: list[PlannedStage] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    precision: list[str] = field(default_factory=list)
    data: list[PlannedData] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def tables(self) -> list[Table]:
        """The tables for the terminal."""
        table = Table(
            "stage", "kind", "state", "model", "origin", "shape", "parameters", "steps", "tokens <=",
            title=f"{self.name}  ->  {self.folder}   engine: {self.engine}",
        )  # fmt: skip
        for stage in self.stages:
            for i, model in enumerate(stage.models):
                layers = f" {model.layers}x{model.width}, {model.heads} heads" if model.layers else ""
                first = (stage.name, stage.kind, stage.state) if i == 0 else ("", "", "")
                work = (_number(stage.steps), _number(stage.tokens)) if i == 0 else ("", "")
                origin = (
                    f"{model.origin} ({model.backend})"
                    if model.backend and BACKENDS[model.backend].shown
                    else model.origin
                )
                origin = "; ".join(filter(None, (origin, model.calibration)))
                table.add_row(*first, model.role, origin, model.architecture + layers, f"{model.parameters:,}", *work)
        rows = Table("stage", "row", title="rows of the objectives, and what caches keep")
        for stage in self.stages:
            for row in stage.rows:
                rows.add_row(stage.name, row)
        chosen = [f"precision: {self.precision[0]}", *self.precision[1:]] if self.precision else []
        table.caption = "\n".join(
            [f"started by: {self.command}", *chosen, *(f"not here yet: {each}" for each in self.missing)]
        )
        planned = [(stage.name, stage.memory) for stage in self.stages if stage.memory is not None]
        more = [_notes_table(self.stages)] if any(stage.notes for stage in self.stages) else []
        return [
            table,
            rows,
            *data_tables(self.data),
            *more,
            *([_memory_table(planned), _verdicts(planned)] if planned else []),
        ]


def _notes_table(stages: list[PlannedStage]) -> Table:
    table = Table("stage", "note", title="what was decided for you")
    for stage in stages:
        for note in stage.notes:
            table.add_row(stage.name, note)
    return table


def _memory_table(stages: list[tuple[str, StageMemory]]) -> Table:
    table = Table(
        "stage", "part", "GB per rank", "GB per host", title="memory at the largest moment of a step, and disk"
    )
    notes: dict[str, None] = {}
    for name, memory in stages:
        for i, part in enumerate(memory.parts):
            table.add_row(name if i == 0 else "", part.name, _gb(part.rank_gb), _gb(part.host_gb))
        table.add_row("", f"total (at: {memory.moment})", _gb(memory.rank_gb), _gb(memory.host_gb))
        table.add_row("", "host, while models are loaded", "", _gb(memory.loading_gb))
        for what, size in memory.disk.items():
            table.add_row("", f"disk: {what}", "", _gb(size))
        notes |= dict.fromkeys(memory.notes)
    table.caption = "; ".join(notes)
    return table


def _verdicts(stages: list[tuple[str, StageMemory]]) -> Table:
    table = Table("stage", "verdict", title="does it fit")
    for name, memory in stages:
        table.add_row(name, memory.verdict)
        for text in memory.advice:
            table.add_row("", f"try {text}")
    return table


def _gb(size: float) -> str:
    return f"{size:.3f}" if size else "-"


def with_consequences(stages: list[PlannedStage]) -> list[PlannedStage]:
    """Skip no stage that needs one which is still to be made: its teachers will change."""
    by_name: dict[str, PlannedStage] = {}
    for stage in stages:
        stale = [need for need in stage.needs if by_name[need].state != SKIPPED]
        if stage.state == SKIPPED and stale:
            stage = replace(stage, state=f"done, but {stale[0]} is not")
        by_name[stage.name] = stage
    return list(by_name.values())


def _model(role: str, model: ModelConfig, info: ModelInfo, parameters: int) -> PlannedModel:
    origin = model.path or "fresh"
    if model.keep_layers:
        origin += f" layers {','.join(map(str, model.keep_layers))}"
    if model.slice:
        origin += ", sliced"
    if model.vocabulary:
        origin += f", {info.vocabulary:,} ids"
    return PlannedModel(role, origin, info.architecture, info.num_layers, info.width, info.num_heads, parameters)


def planned_stage(spec: StageSpec, state: str) -> PlannedStage:
    """A stage of the table; `state` says whether it is done."""
    stage = spec.stage
    trained = [_model(role, stage.trained[role], m.info, m.num_parameters) for role, m in spec.trained.items()]
    trains = bool(stage.trained)
    return PlannedStage(
        spec.name,
        stage.kind,
        state,
        spec.needs,
        [*trained, *(_teacher(teacher, spec.data.name) for teacher in spec.teachers)],
        [row_text(row.match.weight, row.key, row.pairs) for row in spec.rows] if trains else list(spec.cached),
        steps=stage.steps,
        tokens=stage.steps * spec.tokens_per_batch if trains and stage.steps is not None else None,
        notes=spec.notes,
    )


def _teacher(teacher: TeacherSpec, data: str) -> PlannedModel:
    line = _model(teacher.name, teacher.config.model, teacher.info, teacher.numbers.parameters)
    origin = BACKENDS[teacher.backend].origin(teacher.config)
    how = calibration_text(teacher.config, data)
    return replace(line, origin=origin or line.origin, backend=teacher.backend, calibration=how)


def row_text(weight: float, key: str, pairs: tuple[tuple[tuple[int, int], ...], ...]) -> str:
    layers = [f"{s}<-{t}" for s, t in pairs[0]] if pairs and pairs[0] != ((0, 0),) else []
    return f"{weight:g} x {key}" + (f"  (student<-teacher layers {', '.join(layers)})" if layers else "")


def _number(value: int | None) -> str:
    return "?" if value is None else f"{value:,}"
