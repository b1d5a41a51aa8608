"""Data of several entries in one: what goes together, and the columns that the rows of all then have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtkd.config.data import DataConfig
from mtkd.config.source import MIX, RANDOM_TOKENS

_SHAPES = {
    "chats": {"messages": "messages"},
    "prompts": {"prompt": "prompt", "text": "text"},
    "texts": {"text": "text"},
}
"""Columns of mixed rows by what the rows are."""


def resolve_mixes(data: Mapping[str, DataConfig]) -> dict[str, DataConfig]:
    """The `data` entries of a run, those that mix others with what they mix.

    Raises:
        ValueError: an unknown name, or entries that do not go together.
    """
    return {name: _resolved(name, entry, data) if entry.source == MIX else entry for name, entry in data.items()}


def _resolved(name: str, entry: DataConfig, data: Mapping[str, DataConfig]) -> DataConfig:
    where = f"data.{name}.mix"
    unknown = [part for part in entry.mix if part not in data or part == name]
    if unknown:
        others = ", ".join(other for other in data if other != name) or "none"
        raise ValueError(f"{where}: no other data named {unknown[0]!r}; data are: {others}")
    parts = {part: data[part] for part in entry.mix}
    for part, config in parts.items():
        if config.source in (MIX, RANDOM_TOKENS) or config.transfer is not None:
            what = "a mix itself" if config.source == MIX else "made-up tokens"
            raise ValueError(f"{where}: data.{part} is {what}; name entries of texts")
        if config.task != entry.task:
            raise ValueError(
                f"{where}: data.{part} has task {config.task}, and the mix {entry.task}: they are the same"
            )
    columns = _columns(where, parts)
    for field in ("messages", "prompt", "text", "chat", "prompts_only", "name", "domain"):
        value = columns.get(field, type(entry).model_fields[field].default)
        if field in entry.model_fields_set and getattr(entry, field) != value:
            raise ValueError(f"data.{name}.{field}: a mix reads what its parts name: drop it here")
    return entry.with_parts(parts, columns)


def _columns(where: str, parts: Mapping[str, DataConfig]) -> dict[str, Any]:
    """The fields that name the columns of the mixed rows."""
    shapes = {name: _shape(part) for name, part in parts.items()}
    first = next(iter(parts))
    for name, shape in shapes.items():
        if shape != shapes[first]:
            todo = "; set chat: true for prompts, which are then turns" if "chats" in (shape, shapes[first]) else ""
            raise ValueError(
                f"{where}: data.{first} holds {shapes[first]}, data.{name} {shape}: mix what is alike{todo}"
            )
        if parts[name].prompts_only != parts[first].prompts_only:
            raise ValueError(
                f"{where}: of data.{first} and data.{name} one has answers (prompts_only) and one has none"
            )
    columns: dict[str, Any] = {**_SHAPES[shapes[first]], "name": "name", "domain": "domain"}
    if parts[first].prompts_only:
        columns = {**columns, "prompts_only": True}
        columns.pop("text", None)
    return columns


def _shape(config: DataConfig) -> str:
    return "chats" if config.templated else "prompts" if config.prompted else "texts"
