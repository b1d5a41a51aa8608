"""A run.yaml that is damaged: told with file and remedy, and the remedy works (D21)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_run import NAME, write_yaml

import mtkd
from mtkd.engine.precision import begun_in
from mtkd.errors import DataError
from mtkd.evaluate.report import check_whole
from mtkd.running.remember import reopen
from mtkd.running.status import status

AUTO = {"engine": {"precision": "auto"}, "evaluate": None}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a finished run of the teacher alone, in a precision that is chosen."""
    file = write_yaml(tmp_path_factory.mktemp("damaged"), stages={"student": None, "teacher": {"steps": 1}}, **AUTO)
    mtkd.run(mtkd.load_config(file))
    return file


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "cut-before-engine": lambda path: path.write_bytes(path.read_bytes().partition(b"engine:")[0]),
    "binary": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "list": lambda path: path.write_bytes(b"- a\n- b\n"),
    "text": lambda path: path.write_bytes(b"hello"),
    "another version": lambda path: path.write_bytes(b"later: true\n" + path.read_bytes()),
    "another precision": lambda path: path.write_bytes(path.read_bytes().replace(b"precision: ", b"precision: x")),
    "fifo": as_fifo,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_it_is_told_with_file_and_remedy(file: Path, damage: str) -> None:
    """Whoever reads it refuses; `mtkd run` writes it again, in the precision that the stages were made in."""
    run = file.parent / "runs" / NAME
    whole, precision = (run / "run.yaml").read_bytes(), begun_in(run)
    DAMAGES[damage](run / "run.yaml")
    for read in (reopen, status, check_whole):
        with pytest.raises(DataError) as caught:
            read(run)
        assert str(run / "run.yaml") in str(caught.value)
        assert "mtkd run FILE" in caught.value.todo
    assert begun_in(run) == precision
    done = (run / "stages/01-teacher/DONE").read_bytes()
    mtkd.run(mtkd.load_config(file))
    assert (run / "run.yaml").read_bytes() == whole
    assert (run / "stages/01-teacher/DONE").read_bytes() == done
