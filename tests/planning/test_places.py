"""Places in messages are those of the user's file (D21): every one in the code exists, and whole messages name it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
from tiny_run import write_yaml

import mtkd
from mtkd.config import DataConfig, ModelConfig, RunConfig, StageConfig
from mtkd.config.base import Named
from mtkd.config.match import Match
from mtkd.config.read import load_config, split_path
from mtkd.config.teacher import TeacherConfig
from mtkd.config.written import keys_of, step_into
from mtkd.errors import UserError
from mtkd.planning.places import in_file, placed

ROLES: dict[str, Any] = {
    "model": ModelConfig,
    "data": DataConfig,
    "stage": StageConfig,
    "teacher": TeacherConfig,
    "weighting": Named,
    "row": Match,
}
ROOT = Path(mtkd.__file__).parent
UNNAMED = "\0"


def literal_places() -> Iterator[tuple[str, str]]:
    """(file:line, text) of every `where=` that is written out; UNNAMED stands for what is put in by an expression."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "where":
                if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                    yield f"{file.name}:{node.value.lineno}", node.value.value
                elif isinstance(node.value, ast.JoinedStr):
                    parts = [p.value if isinstance(p, ast.Constant) else UNNAMED for p in node.value.values]
                    yield f"{file.name}:{node.value.lineno}", "".join(map(str, parts))


def is_known(annotation: Any, parts: list[str]) -> bool:
    """Whether the schema knows a path; below what is put in by an expression everything is fine that some key has."""
    for part in parts:
        if UNNAMED in part and keys_of(annotation):
            return True
        key = int(part) if part.isdecimal() else 0 if part == UNNAMED else part
        found = step_into(annotation, key)
        annotation = step_into(annotation, part) if found is None else found
        if annotation is None:
            return False
    return True


def test_every_literal_place_is_in_the_schema() -> None:
    """`@ROLE.key` is a key of that block, `stages.X.key` one of a stage; nothing is at `model.path`."""
    wrong, seen = [], 0
    for origin, text in literal_places():
        role, _, rest = text.removeprefix("@").partition(".")
        if text.startswith("@"):
            fine = role in ROLES and is_known(ROLES[role], split_path(rest) if rest else [])
        elif role in RunConfig.model_fields:
            fine = is_known(RunConfig, split_path(text))
        else:
            fine = role not in ROLES and not re.match("(stage|teacher|row) '", text)
        seen += text.startswith("@") or role in RunConfig.model_fields
        wrong += [] if fine else [f"{origin}: {text}"]
    assert wrong == []
    assert seen > 100


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("@model", "stages.s.student"),
        ("@model.slice.heads", "stages.s.student.slice.heads"),
        ("@data.limit.train", "data.text.limit.train"),
        ("@models", "@models"),
        ("engine.kind", "engine.kind"),
        ("/some/file.json", "/some/file.json"),
    ],
)
def test_whoever_knows_the_place_says_it(where: str, found: str) -> None:
    """Other places stay; a file says what it is used by, once."""
    with (
        pytest.raises(UserError) as caught,
        placed(model="elsewhere"),
        placed(model="stages.s.student", data="data.text"),
    ):
        raise UserError("wrong", where=where)
    assert caught.value.where == found
    assert caught.value.used_by == ("stages.s.student" if found.startswith("/") else "")


def placed_message(file: Path, where: str, **wrong: str) -> str:
    config = load_config(file)
    with pytest.raises(UserError) as caught, in_file(config):
        raise UserError("wrong", where=where)
    return str(caught.value).removeprefix(str(file))


def test_a_place_has_file_and_line(tmp_path: Path) -> None:
    """The line of what was written, as near as it was written; a file on disk has none."""
    file = write_yaml(tmp_path)
    lines = file.read_text().splitlines()
    line = 1 + next(i for i, text in enumerate(lines) if text.strip() == "teachers:")
    assert placed_message(file, "stages.student.teachers[0].model.path") == (
        f":{line + 1}: stages.student.teachers[0]: wrong"
    )
    assert placed_message(file, "stages.student.match[1]").endswith(": stages.student.match[1]: wrong")
    for where in ("data.jsonl", "tokenizer.json", "/x/y.json", "-o", ""):
        assert placed_message(file, where) == f"{where}: wrong" if where else "wrong"


CHAIN = {
    "teachers": [{"model": "stage:teacher"}],
    "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2},
    "rungs": [{"layers": 1, "width": 12, "heads": 2}],
    "mode": "takd",
    "data": "text",
    "steps": 2,
    "batch": {"sequences": 8},
    "optimizer": {"lr": 1e-2},
}


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("stages.student.student.width", "chain.student.width"),
        ("stages.assistant-1.student.heads", "chain.rungs[0].heads"),
        ("stages.assistant-1.teachers[0].model", "chain.teachers[0].model"),
        ("stages.student.teachers[0].model", "chain.rungs[0]"),
        ("stages.student.optimizer.lr", "chain.optimizer.lr"),
        ("stages.teacher.student", "stages.teacher.student"),
    ],
)
def test_a_stage_of_a_chain_is_where_the_chain_says_it(tmp_path: Path, where: str, found: str) -> None:
    file = write_yaml(tmp_path, stages={"student": None}, chain=CHAIN, evaluate=None)
    assert re.search(rf":\d+: {re.escape(found)}: wrong$", placed_message(file, where))


def missing_teacher(folder: Path) -> tuple[dict[str, Any], str]:
    return {"teachers": ["stage:teacher", "no/such-folder"]}, "stages.student.teachers[1]"


def missing_heads(folder: Path) -> tuple[dict[str, Any], str]:
    return {"student": {"width": 9}}, "stages.student.student"


def teacher_without_files(folder: Path) -> tuple[dict[str, Any], str]:
    (folder / "bare").mkdir()
    return {"teachers": ["stage:teacher", "bare"]}, "used by: {file}:{line}: stages.student.teachers[1]"


@pytest.mark.parametrize("mistake", [missing_teacher, missing_heads, teacher_without_files])
def test_whole_messages_name_the_block(tmp_path: Path, mistake: Any) -> None:
    """From the command, with file and line."""
    student, place = mistake(tmp_path)
    file = write_yaml(tmp_path, stages={"student": student})
    code, output = processes.run(tmp_path, "plan", str(file))
    assert code in (2, 3), output
    assert re.search(rf"{re.escape(str(file))}:\d+: {re.escape(place.rpartition(': ')[2])}", output), output
    assert "model.path" not in output
