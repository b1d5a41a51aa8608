"""Data that an earlier stage writes: `{source: stage, stage: NAME}` of a `kind: generate` stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtkd.config.data import DataConfig
from mtkd.config.mix import common_columns
from mtkd.config.source import STAGE
from mtkd.config.stage import StageConfig


def resolve_stage_data(
    data: Mapping[str, DataConfig], stages: Mapping[str, StageConfig], folder: Path
) -> dict[str, DataConfig]:
    """The `data` entries of a run, those that a stage writes with the data of its prompts.

    Args:
        folder: of the run.
    Raises:
        ValueError: an unknown stage, or one of another kind.
    """
    return {
        name: _resolved(name, entry, data, stages, folder) if entry.source == STAGE else entry
        for name, entry in data.items()
    }


def _resolved(
    name: str, entry: DataConfig, data: Mapping[str, DataConfig], stages: Mapping[str, StageConfig], folder: Path
) -> DataConfig:
    where = f"data.{name}.stage"
    stage = stages.get(entry.stage or "")
    if stage is None or stage.kind != "generate":
        writing = ", ".join(n for n, each in stages.items() if each.kind == "generate") or "none"
        raise ValueError(f"{where}: {entry.stage!r} is no stage of kind: generate; these are: {writing}")
    of = stage.data or next(iter(data))
    if of not in data or data[of].source == STAGE:
        raise ValueError(f"{where}: stage {entry.stage!r} answers data {of!r}, which is no entry of prompts")
    prompts = data[of]
    if not prompts.prompted or prompts.task != entry.task:
        raise ValueError(f"{where}: data.{of} has task {prompts.task} and must have prompts")
    columns: dict[str, Any] = {"text": "text", **common_columns(where, {of: prompts}), "prompts_only": False}
    if "messages" in columns:
        columns = {**columns, "mask_history": True}  # what was written alone is predicted
        columns.pop("text")
    for field, value in columns.items():
        if field in entry.model_fields_set and getattr(entry, field) != value:
            raise ValueError(f"data.{name}.{field}: the stage's texts have columns of their own: drop it here")
    if "max_length" not in entry.model_fields_set:
        columns["max_length"] = prompts.max_length
    return entry.with_parts({of: prompts}, columns, folder)
