"""What a configuration can name: the rows behind `mtkd ls`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mtkd.registry import LOSSES, METHODS, SOURCES, TASKS, WEIGHTINGS, load_plugins


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
    }
    return rows[what]()


def _options(parameters: dict[str, inspect.Parameter]) -> str:
    empty = inspect.Parameter.empty
    return ", ".join(n if p.default is empty else f"{n}={p.default}" for n, p in parameters.items()) or "-"


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n")[0]


def _methods() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "stages": ", ".join(spec.stages),
            "rows": "; ".join(f"{r.feature}:{r.loss} x{r.weight:g}" for r in spec.function()),
            "must be equal": ", ".join(spec.must_be_equal) or "-",
            "options": _options(spec.options()),
            "source": spec.source,
            "from": METHODS.origin(name),
        }
        for name, spec in METHODS.items()
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
