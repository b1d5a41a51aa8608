"""What a configuration can name: the rows behind `mtkd ls`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from rich import box
from rich.table import Table

from mtkd.data.transforms import TRANSFORMS
from mtkd.losses.spec import LOSSES
from mtkd.methods.spec import METHODS
from mtkd.methods.table import COLUMNS, FEATURES, method_table
from mtkd.registry import SOURCES, TASKS, load_plugins
from mtkd.weightings.spec import WEIGHTINGS


def listing(what: str, plugins: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Rows of one list, each a mapping column -> value."""
    load_plugins(plugins)
    rows: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "methods": _methods,
        "losses": _losses,
        "weightings": _weightings,
        "teachers": _teachers,
        "tasks": _tasks,
        "sources": _sources,
        "transforms": _transforms,
    }
    return rows[what]()


def tables(what: str, rows: list[dict[str, Any]], width: int) -> list[Table]:
    """The rows (at least one) for a terminal of `width` columns; methods are the table, then labels and options."""
    if what != "methods":
        return [_table(what, [*rows[0]], [[*map(str, row.values())] for row in rows])]
    keys = ("name", "from", "options", "source")
    details = [[*(row[key] for key in keys[:2]), _labels(row["rows"]), *(row[key] for key in keys[2:])] for row in rows]
    more = _table("", ["name", "from", "labels of rows, per step", "options", "source"], details)
    if width >= _WIDE:
        return [_table(what, [*COLUMNS], [[row[c] for c in COLUMNS] for row in rows], box.SIMPLE), more]
    # Too narrow for a column per feature: the same cells one after the other.
    short = [[row["name"], row["stages"], _cells(row), row["must be equal"]] for row in rows]
    return [_table(what, ["name", "stages", "features", "must be equal"], short, box.SIMPLE), more]


_WIDE = 140  # columns of a terminal that hold the method table without breaking words


def _table(title: str, columns: list[str], rows: list[list[str]], style: box.Box = box.HEAVY_HEAD) -> Table:
    table = Table(title=title or None, box=style)
    for column in columns:
        table.add_column(column, overflow="fold")  # a long option goes on in the next line, never ends in dots
    for row in rows:
        table.add_row(*row)
    return table


def _cells(row: dict[str, Any]) -> str:
    return ", ".join(f"{feature} {row[feature]}" for feature in FEATURES if row[feature])


def _labels(rows: dict[str, list[str]]) -> str:
    return "; ".join(f"{step}: {', '.join(labels)}" for step, labels in rows.items())


def _options(parameters: dict[str, inspect.Parameter]) -> str:
    empty = inspect.Parameter.empty
    return ", ".join(n if p.default is empty else f"{n}={p.default}" for n, p in parameters.items()) or "-"


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def _methods() -> list[dict[str, Any]]:
    """The method table, with the labels of each method's rows, its options and its source."""
    return [
        {
            **cells,
            "rows": {step: list(METHODS[cells["name"]].rows({}, step)) for step in METHODS[cells["name"]].steps},
            "options": _options(METHODS[cells["name"]].options()),
            "source": METHODS[cells["name"]].source,
            "from": METHODS.origin(cells["name"]),
        }
        for cells in method_table()
    ]


def _losses() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "compares": "labels" if spec.labels else "teacher",
            "features": ", ".join(spec.inputs),
            "options": _options(spec.options()),
            "what": _first_line(spec.function),
            "from": LOSSES.origin(name),
        }
        for name, spec in LOSSES.items()
    ]


def _weightings() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "sums to 1": "yes" if spec.sums_to_one else "no",
            "labels": "needed" if spec.needs_labels else "not needed",
            "options": _options(spec.options()),
            "what": _first_line(spec.cls),
            "from": WEIGHTINGS.origin(name),
        }
        for name, spec in WEIGHTINGS.items()
    ]


def _teachers() -> list[dict[str, Any]]:
    from mtkd.models.cards import load_cards

    return [
        {
            "name": name,
            "source": card.source,
            "architecture": card.architecture,
            "layers x width": f"{card.layers}x{card.width}",
            "parameters": f"{card.parameters:,}",
            "memory (GB)": card.memory_gb,
            "teaches": card.teaches,
            "tokenizer": card.tokenizer,
            "licence": card.licence,
        }
        for name, card in load_cards().items()
    ]


def _tasks() -> list[dict[str, Any]]:
    return [
        {"name": name, "model": task.auto_class, "metrics": ", ".join(task.metrics), "from": TASKS.origin(name)}
        for name, task in TASKS.items()
    ]


def _sources() -> list[dict[str, Any]]:
    return [
        {"name": name, "what": _first_line(source), "from": SOURCES.origin(name)} for name, source in SOURCES.items()
    ]


def _transforms() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "options": _options(spec.options()),
            "what": _first_line(spec.function),
            "from": TRANSFORMS.origin(name),
        }
        for name, spec in TRANSFORMS.items()
    ]
