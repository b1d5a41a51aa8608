"""`--redo`: planned first, set aside, removed when the new one is sealed; a kill or a mistake costs nothing."""

from __future__ import annotations

import hashlib
import shutil
import signal
from pathlib import Path

import processes
import pytest
from tiny_run import NAME, write_yaml

from mtkd.errors import EXIT_DATA, EXIT_NON_FINITE, EXIT_USAGE

KEPT = ("results.json", "report.html")


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A folder with a finished run, whose report was drawn."""
    for name in ("data", "runs"):
        shutil.copytree(whole / name, tmp_path / name)
    (tmp_path / "runs" / NAME / "report.html").write_text("a page\n")
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder but the lock -> digest."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "LOCK"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def of_stage(run: Path, pattern: str) -> dict[str, str]:
    """The model of a stage, and its DONE."""
    (folder,) = run.glob(f"stages/{pattern}")
    return {name: text for name, text in tree(folder).items() if name.startswith(("export/", "DONE"))}


def num_lines(run: Path) -> int:
    """Lines of the student in metrics.jsonl."""
    return sum('"student"' in line for line in (run / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("point", ["while-forgetting", "after-rename@3", "before-done@8"])
def test_a_killed_redo_keeps_the_old_stage_and_the_results_until_the_new_one_is_done(
    point: str, whole: Path, finished: Path
) -> None:
    """Law: at every moment the finished stage is whole in one place, and the report and results are there."""
    file, run = str(write_yaml(finished)), finished / "runs" / NAME
    old, kept = of_stage(run, "02-student"), {name: (run / name).read_bytes() for name in KEPT}
    code, output = processes.run(finished, "run", file, "--redo", "student", environment={"MTKD_TEST_KILL_AT": point})
    assert code == -signal.SIGKILL, output
    assert of_stage(run, ".before-02-student") == old
    assert {name: (run / name).read_bytes() for name in KEPT} == kept
    code, output = processes.run(finished, "run", file)
    assert code == 0, output
    assert not list(run.glob("stages/.*"))
    new = of_stage(run, "02-student")
    assert {n: d for n, d in new.items() if n != "DONE"} == {n: d for n, d in old.items() if n != "DONE"}
    assert num_lines(run) == num_lines(whole / "runs" / NAME)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("-o", "stages.student.stepz=3"), EXIT_USAGE),
        (("-o", "stages.student.method=nosuch"), EXIT_USAGE),
        (("-o", "plugins=[not-here.py]"), EXIT_USAGE),
        (("-o", "stages.student.teachers=[nowhere/model]"), EXIT_DATA),
        (("-o", "data.text.path=nowhere"), EXIT_DATA),
        (("-o", "stages.student.student.heads=3"), EXIT_USAGE),
        (("--redo", "nosuch"), EXIT_USAGE),
    ],
)
def test_a_redo_with_a_mistake_touches_nothing(arguments: tuple[str, ...], code: int, finished: Path) -> None:
    """Law: every file below the run folder is what it was, bit for bit."""
    file, run = str(write_yaml(finished)), finished / "runs" / NAME
    before = tree(run)
    found, output = processes.run(finished, "run", file, "--redo", "teacher", *arguments)
    assert found == code, output
    assert "Traceback" not in output
    assert tree(run) == before


def test_a_redo_that_fails_before_anything_is_saved_is_undone(finished: Path) -> None:
    """A learning rate that overflows at once: the old stage, its lines and its results are back."""
    file, run = str(write_yaml(finished)), finished / "runs" / NAME
    before = tree(run)
    arguments = ("--redo", "student", "-o", "stages.student.optimizer.lr=1e38", "-o", "stages.student.save_every=0")
    code, output = processes.run(finished, "run", file, *arguments)
    assert code == EXIT_NON_FINITE, output
    assert "put back as they were before --redo: student" in output
    changed = {name for name, digest in tree(run).items() if before.get(name) != digest} | (before.keys() - tree(run))
    assert changed <= {"env.json"}, changed
    code, output = processes.run(finished, "run", file)
    assert code == 0, output
    assert "stage student: done" in output
