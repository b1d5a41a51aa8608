"""What the library imports is what `pyproject.toml` declares and `launch/constraints.txt` pins."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from test_imports import MODULES, PACKAGE, imported

ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared() -> set[str]:
    return {canonical(re.split(r"[^\w.-]", line)[0]) for line in PROJECT["dependencies"]}


def foreign() -> dict[str, Path]:
    """Top-level modules that the library imports and neither it nor Python brings -> a file that does."""
    found = {name.split(".")[0]: source for module, source in MODULES.items() for _, name in imported(module, source)}
    return {name: source for name, source in found.items() if name not in (*sys.stdlib_module_names, "mtkd")}


@pytest.mark.parametrize("module", sorted(foreign()))
def test_every_import_is_a_declared_dependency(module: str) -> None:
    """A library that another one happens to bring may be gone with the next release of that one."""
    brings = {canonical(name) for name in packages_distributions().get(module, [])}
    assert brings & declared(), f"{foreign()[module]} imports {module}: declare one of {brings or 'what brings it'}"


def test_every_dependency_is_pinned_and_imported() -> None:
    """The pins cover what is declared (torch comes from its own index), and nothing is declared that nobody imports."""
    pins = {canonical(line.split("==")[0]) for line in (ROOT / "launch/constraints.txt").read_text().splitlines()}
    assert declared() <= pins
    brought = {canonical(n) for module in foreign() for n in packages_distributions().get(module, [])}
    assert declared() <= brought
