"""Print results on standard output: as JSON, or as tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from mtkd.errors import UserError


def print_json(value: Any) -> None:
    """A value as JSON; numbers that are not finite are null."""
    from mtkd.engine.jsonlines import finite

    typer.echo(json.dumps(finite(value), indent=2, default=str, allow_nan=False))


def print_tables(tables: list[Table]) -> None:
    """Tables, one below the other."""
    shown = console()
    for table in tables:
        shown.print(table)


def console() -> Console:
    """Standard output."""
    # A file or a pipe has no width: wide enough that nothing is cut there.
    return Console() if sys.stdout.isatty() else Console(width=160)


def run_folder(folder: Path) -> Path:
    """The folder of a run.

    Raises:
        UserError: it is none.
    """
    if not (folder / "run.yaml").exists():
        raise UserError("not a run folder (no run.yaml in it)", found=str(folder), todo="give e.g. runs/quickstart")
    return folder
