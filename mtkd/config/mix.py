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

_SHAPING = ("max_length", "mask_share", "next_sentence", "infill", "redraw")
"""Fields that make examples of rows; a mix has one value of each."""


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
    # By name: the order in a user's file changes no row's number, of which caches and resumed runs know their rows.
    parts = {part: data[part] for part in sorted(entry.mix)}
    for part, config in parts.items():
        if config.source in (MIX, RANDOM_TOKENS) or config.transfer is not None:
            what = "a mix itself" if config.source == MIX else "made-up tokens"
            raise ValueError(f"{where}: data.{part} is {what}; name entries of texts")
        if config.task != entry.task:
            raise ValueError(
                f"{where}: data.{part} has task {config.task}, and the mix {entry.task}: they are the same"
            )
    columns = common_columns(where, parts)
    for field in ("messages", "prompt", "text", "chat", "prompts_only", "name", "domain", "teacher"):
        value = columns.get(field, type(entry).model_fields[field].default)
        if field in entry.model_fields_set and getattr(entry, field) != value:
            raise ValueError(f"data.{name}.{field}: a mix reads what its parts name: drop it here")
    return entry.with_parts(parts, {**columns, **_shaping(name, entry, parts)})


def _shaping(name: str, entry: DataConfig, parts: Mapping[str, DataConfig]) -> dict[str, Any]:
    """How rows become examples, where the mix leaves it to its parts; raises ValueError where these differ."""
    taken = {}
    for field in _SHAPING:
        if field in entry.model_fields_set or not any(field in part.model_fields_set for part in parts.values()):
            continue
        values = {part: getattr(config, field) for part, config in parts.items()}
        if any(value != next(iter(values.values())) for value in values.values()):
            said = ", ".join(f"{value} of data.{part}" for part, value in values.items())
            raise ValueError(f"data.{name}.{field}: the parts of the mix differ: {said}; set it here, for all of them")
        taken[field] = next(iter(values.values()))
    return taken


def common_columns(where: str, parts: Mapping[str, DataConfig]) -> dict[str, Any]:
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
    columns: dict[str, Any] = {**_SHAPES[shapes[first]], "name": "name", "domain": "domain", "teacher": "teacher"}
    if parts[first].prompts_only:
        columns = {**columns, "prompts_only": True}
        columns.pop("text", None)
    return columns


def _shape(config: DataConfig) -> str:
    return "chats" if config.templated else "prompts" if config.prompted else "texts"
