"""The import order of the library, and what must stay light; found by reading the sources, not by importing them."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mtkd"

# Each imports from those before it alone. Read as a sentence: a config names methods; data, losses, models and
# weightings are the nouns; an engine trains; a pool teaches; the objective weighs and compares; evaluate judges;
# planning foresees, running does; the cli asks.
ORDER = (
    *("errors", "config", "registry", "methods", "data", "losses", "models", "weightings", "engine", "pool"),
    *("objective", "evaluate", "planning", "running", "cli"),
)


def sources() -> dict[str, Path]:
    """Every module by its dotted name; a package by its own."""
    files = {".".join(["mtkd", *p.relative_to(PACKAGE).with_suffix("").parts]): p for p in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in files.items()}


def imported(name: str, source: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module: those in functions and those for type checkers included."""
    package = name if source.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source.read_text(), str(source))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def module_of(name: str, modules: dict[str, Path]) -> str | None:
    """The module that holds a name: `mtkd.data.batch` of `mtkd.data.batch.Batch`; None for another library's."""
    parts = name.split(".")
    heads = (".".join(parts[:k]) for k in range(len(parts), 1, -1))
    return next((head for head in heads if head in modules), None)


def arrows(modules: dict[str, Path]) -> dict[str, dict[str, int]]:
    """Module -> modules that it imports -> line."""
    graph: dict[str, dict[str, int]] = {}
    for name, source in modules.items():
        found = graph.setdefault(name, {})
        for line, what in imported(name, source):
            other = module_of(what, modules)
            if other and other != name:
                found.setdefault(other, line)
    return graph


MODULES = sources()
GRAPH = arrows(MODULES)
FACE = ("mtkd", "mtkd.__main__")
"""What is imported from outside: `import mtkd`, `python -m mtkd`."""


def unit(module: str) -> str:
    return module.split(".")[1]


def test_the_house_has_fifteen_names() -> None:
    found = {unit(name) for name in MODULES if name not in FACE}
    assert found == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_package_imports_from_those_before_it(name: str) -> None:
    later = set(ORDER[ORDER.index(name) + 1 :])
    wrong = [
        f"{module}:{line} imports {other}"
        for module, others in GRAPH.items()
        if module not in FACE and unit(module) == name
        for other, line in others.items()
        if other in FACE or unit(other) in later
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_one_another() -> None:
    """Inside packages too, a package's own `__init__` included."""
    try:
        graphlib.TopologicalSorter({name: set(others) for name, others in GRAPH.items()}).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def test_the_reader_of_imports_sees_all_forms(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text(
        "import mtkd.cli\nfrom mtkd import train\nfrom ..report import html\nfrom . import batch\n"
        "def f():\n    from mtkd.evaluate.score import mean_loss\n"
    )
    forms = ["mtkd.cli", "mtkd.train", "mtkd.report.html", "mtkd.data.batch", "mtkd.evaluate.score.mean_loss"]
    assert [name for _, name in imported("mtkd.data.example", file)] == forms
    (tmp_path / "__init__.py").write_text("from . import batch\n")
    assert list(imported("mtkd.data", tmp_path / "__init__.py")) == [(1, "mtkd.data.batch")]
    known = {"mtkd": file, "mtkd.data": file, "mtkd.data.batch": file}
    assert module_of("mtkd.data.batch.Batch", known) == "mtkd.data.batch"
    assert module_of("mtkd.data.Batch", known) == "mtkd.data"
    assert module_of("torch.nn", known) is None


HEAVY = ("torch", "transformers", "deepspeed", "datasets", "matplotlib", "scipy", "tokenizers")
LIGHT = ("mtkd", "mtkd.errors", "mtkd.registry", "mtkd.config", "mtkd.config.read", "mtkd.engine.folder")


def test_light_modules_import_nothing_heavy() -> None:
    """`mtkd --help` and a refused configuration answer at once."""
    code = f"""
import importlib, sys
for module in {(*LIGHT, "mtkd.engine.dist")!r}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, f"{{module}} imports {{heavy}}"
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize("library", ["deepspeed", "matplotlib", "datasets"])
def test_heavy_libraries_are_imported_where_they_are_used(library: str) -> None:
    for source in MODULES.values():
        tree = ast.parse(source.read_text())
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [a.name for n in top if isinstance(n, ast.Import) for a in n.names]
        names += [n.module or "" for n in top if isinstance(n, ast.ImportFrom)]
        assert library not in {name.split(".")[0] for name in names}, source
