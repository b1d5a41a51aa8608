"""The import order of the library, and what must stay light; found by reading the sources, not by importing them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtkd"

# A unit is a module or a package directly below mtkd/. It may import units of its own row and of the rows above it.
ORDER = (
    (
        "errors",
        "specs",
        "plugincode",
        "registry",
        "blame",
        "products",
        "features",
        "yamlfile",
        "console",
        "secret",
        "disk",
        "orphans",
        "stopping",
        "jsonlines",
        "pieces",
        "record",
        "manifest",
    ),
    ("match", "methods", "config", "configfile", "places", "hostfile", "launcher"),
    ("losses", "weightings", "models", "data", "engine"),
    (
        "rows",
        "mix",
        "seal",
        "cache",
        "sparse",
        "ensembles",
        "tiles",
        "pool",
        "projection",
        "objective",
        "gram",
        "cofinetune",
    ),
    (
        *("chain", "redo", "ladder", "rundir", "locate", "memory", "footprint", "budget", "modelplan", "dataplan"),
        *("notes", "exports", "remember", "cachefolder", "cacheplan", "planned", "agreement", "teaching", "dataview"),
        *("labelplan", "precision"),
    ),
    ("build", "built", "checks", "planner"),
    ("evaluate", "lookaround"),
    ("selection", "overflow", "train", "capture", "chance"),
    ("report", "runner", "status", "table", "listing", "doctor", "laws", "testing"),
    ("cli",),
    ("__main__",),
)
ROW = {unit: row for row, units in enumerate(ORDER) for unit in units}


def units() -> list[str]:
    return sorted(p.stem for p in PACKAGE.iterdir() if p.name != "__init__.py" and (p.suffix == ".py" or has_code(p)))


def has_code(folder: Path) -> bool:
    return folder.is_dir() and (folder / "__init__.py").exists()


def sources(unit: str) -> list[Path]:
    folder = PACKAGE / unit
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{unit}.py"]


def imported(source: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a file, those inside functions and for type checkers included."""
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                base = ["mtkd", *source.relative_to(PACKAGE).parts]
                module = ".".join([*base[: -node.level], *filter(None, [module])])
            for alias in node.names:
                yield node.lineno, f"{module}.{alias.name}"


def edges(unit: str) -> dict[str, str]:
    """Other units this one imports -> the first place where it does."""
    found: dict[str, str] = {}
    for source in sources(unit):
        for line, name in imported(source):
            parts = name.split(".")
            if parts[0] == "mtkd" and len(parts) > 1 and parts[1] in ROW and parts[1] != unit:
                found.setdefault(parts[1], f"{source.relative_to(PACKAGE.parent)}:{line}")
    return found


def test_every_unit_has_its_row() -> None:
    assert sorted(set(units()) - ROW.keys()) == [], "give the new file a place in ORDER"


@pytest.mark.parametrize("unit", units())
def test_imports_point_upwards(unit: str) -> None:
    wrong = {other: place for other, place in edges(unit).items() if ROW[other] > ROW[unit]}
    assert not wrong, f"{unit} (row {ROW[unit]}) imports from later rows: {wrong}"


def test_there_are_no_circles() -> None:
    graph = {unit: edges(unit) for unit in units()}
    finished: set[str] = set()

    def walk(unit: str, above: tuple[str, ...]) -> None:
        assert unit not in above, f"a circle of imports: {' -> '.join((*above, unit))}"
        if unit not in finished:
            for other in graph.get(unit, {}):
                walk(other, (*above, unit))
            finished.add(unit)

    for unit in graph:
        walk(unit, ())


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path) -> None:
    source = PACKAGE / "data" / "example.py"  # only its place matters; nothing is written there

    class Text(type(source)):  # type: ignore[misc]
        def read_text(self, *_: object) -> str:
            return (
                "import mtkd.cli\nfrom mtkd import train\nfrom ..report import html\nfrom . import batch\n"
                "def f():\n    from mtkd.evaluate.score import mean_loss\n"
            )

    assert [name for _, name in imported(Text(source))] == [
        "mtkd.cli",
        "mtkd.train",
        "mtkd.report.html",
        "mtkd.data.batch",
        "mtkd.evaluate.score.mean_loss",
    ]


HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib", "scipy", "tokenizers")
LIGHT = ("mtkd", "mtkd.errors", "mtkd.registry", "mtkd.config", "mtkd.configfile", "mtkd.rundir", "mtkd.engine.dist")


def test_light_modules_import_nothing_heavy() -> None:
    """`mtkd --help` and a refused configuration answer at once."""
    code = f"""
import importlib, sys
for module in {LIGHT!r}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("library", ["deepspeed", "matplotlib", "datasets"])
def test_heavy_libraries_are_imported_where_they_are_used(library: str) -> None:
    for unit in units():
        for source in sources(unit):
            tree = ast.parse(source.read_text())
            top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
            names += [n.module or "" for n in top if isinstance(n, ast.ImportFrom)]
            assert library not in {name.split(".")[0] for name in names}, source
