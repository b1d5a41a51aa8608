"""A backend is a file in pool/: nothing else knows its name."""

from __future__ import annotations

import ast

import pytest
from test_imports import MODULES, unit

from mtkd.config.teacher import BUILT_IN
from mtkd.pool import BACKENDS, Backend
from mtkd.pool.backends import teacher_share
from mtkd.pool.sizes import Place, Share, TeacherSize

ELSEWHERE = [name for name in MODULES if "." in name and unit(name) not in ("pool", "config")]


def compared(tree: ast.AST) -> set[str]:
    """Every constant text that is compared with something, in lists of them too."""
    sides = [
        side for node in ast.walk(tree) if isinstance(node, ast.Compare) for side in (node.left, *node.comparators)
    ]
    parts = [
        part for side in sides for part in (side.elts if isinstance(side, ast.Tuple | ast.List | ast.Set) else [side])
    ]
    return {part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)}


@pytest.mark.parametrize("module", ELSEWHERE)
def test_no_backend_is_compared_by_its_name(module: str) -> None:
    assert not compared(ast.parse(MODULES[module].read_text())) & set(BACKENDS)


def test_the_search_finds_comparisons() -> None:
    text = 'if a.backend in ("streamed", "sharded") or "cached" != b or [x for x in c if x == "resident"]: pass'
    assert compared(ast.parse(text)) == {"streamed", "sharded", "cached", "resident"}


def test_every_name_of_the_configuration_is_a_backend() -> None:
    assert set(BUILT_IN) == set(BACKENDS)


def test_advice_names_backends_that_take_less() -> None:
    """Law: of a resident teacher the lighter ones need less of a GPU, whatever its size."""
    place = Place(on_gpu=True, ranks=4, local=4)
    for name, backend in BACKENDS.items():
        for lighter in backend.lighter:
            sizes = [TeacherSize(1_000_000, 1_000, which, 10, ahead=0) for which in (name, lighter)]
            whole, less = (teacher_share([size] * 4, place).rank for size in sizes)
            assert less < whole


def test_a_backend_says_little_by_default() -> None:
    assert Backend().memory([TeacherSize(1, 1, "x")], Place(on_gpu=False)) == Share()
    assert Backend().remark(10) == ""
