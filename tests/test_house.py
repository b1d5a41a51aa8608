"""The rules of the house that a reader can count: sizes, names at the top, one place for each decision."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtkd"
SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}

MOST = {"file": 400, "class": 200, "function": 50}
"""Lines, docstrings included."""

MOST_PARAMETERS = 8


def definitions(source: str) -> Iterator[tuple[str, str, int]]:
    """(kind, name, size) of everything that has a size."""
    yield "file", "", source.count("\n")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            yield "class", node.name, (node.end_lineno or 0) - node.lineno + 1
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield "function", node.name, (node.end_lineno or 0) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Parameters that a caller gives: without self and cls."""
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len(names) - (bool(names) and names[0] in ("self", "cls"))


@pytest.mark.parametrize("path", SOURCES)
def test_nothing_is_longer_than_it_may_be(path: str) -> None:
    """Law: a file fits a head, a function fits a screen."""
    long = [(kind, name, size) for kind, name, size in definitions(SOURCES[path]) if size > MOST[kind]]
    assert long == []


@pytest.mark.parametrize("path", SOURCES)
def test_no_parameter_list_is_longer_than_eight(path: str) -> None:
    functions = [n for n in ast.walk(ast.parse(SOURCES[path])) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [(f.name, parameters(f)) for f in functions if parameters(f) > MOST_PARAMETERS] == []


def test_the_top_reads_like_a_table_of_contents() -> None:
    """Law: 15 names beside the package's own files."""
    names = {path.name for path in PACKAGE.iterdir()} - {"__init__.py", "__main__.py", "__pycache__", "py.typed"}
    assert len(names - {"teachers"}) <= 15  # of a wheel: the cards


def test_there_is_one_way_to_an_objective() -> None:
    """Law: the library constructs `Objective` in one place, which build, plan and tests share."""
    calls = [
        path
        for path, source in SOURCES.items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Objective"
    ]
    assert calls == ["objective/wire.py"]
