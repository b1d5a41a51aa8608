"""References to earlier stages: one grammar, in one place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mtkd
from mtkd.config import ModelConfig, StageRef, ensemble_of

LIBRARY = Path(mtkd.__file__).parent


@pytest.mark.parametrize(
    ("path", "stage", "part"),
    [("stage:a", "a", ""), ("stage:a/b", "a", "b"), ("stage:a.1/b-c", "a.1", "b-c"), ("stage:a/b/c", "a", "b/c")],
)
def test_a_reference_is_read_and_written_back(path, stage, part):
    """Law: str(parse(path)) == path."""
    ref = ModelConfig(path=path).stage
    assert ref == StageRef(stage, part)
    assert str(ref) == path
    assert StageRef.named(ref.model) == ref


@pytest.mark.parametrize("path", [None, "stages/a", "a/stage:b", "Stage:a"])
def test_other_paths_are_no_reference(path):
    """Law: only a path that begins with stage: is a reference."""
    assert StageRef.parse(path) is None


def test_an_ensemble_is_named_by_its_stage():
    """Law: ensemble_of("ensemble:x") = x, and None for others."""
    assert ensemble_of("ensemble:a") == "a"
    assert ensemble_of("a/ensemble:b") is None


def test_only_config_takes_references_apart():
    """No string "stage:" or "ensemble:" is compared, cut off or put in front outside `config/`."""
    offenders = []
    for file in LIBRARY.rglob("*.py"):
        if file.relative_to(LIBRARY).parts[0] == "config":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            texts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            marked = any(text in ("stage:", "ensemble:") or text.startswith("stage:{") for text in texts)
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
            if marked and (called or isinstance(node, ast.Compare | ast.BinOp | ast.Subscript)):
                offenders.append(f"{file.relative_to(LIBRARY)}:{node.lineno}")
            if isinstance(node, ast.Name) and node.id in ("STAGE_PREFIX",):
                offenders.append(f"{file.relative_to(LIBRARY)}:{node.lineno}")
    assert offenders == []
