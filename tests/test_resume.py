"""Stop and resume is bit-equal to never having stopped (faults F01, F02, F04), in whole runs of the command."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from tiny_run import NAME, STUDENT_STEPS, TEACHER_STEPS, ids_file, undisturbed, with_teacher, write_yaml

from mtkd.seal import check_seal, newest_sealed, read_jsonl

pytestmark = pytest.mark.xdist_group("runs")  # they share an undisturbed run

STUDENT = f"runs/{NAME}/stages/02-student"
CLOCK = {"time", "seconds"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return undisturbed(tmp_path_factory.mktemp)


def losses(folder: Path) -> dict[tuple[str, int, bool], dict[str, Any]]:
    """The last metrics line of each kind, step and stage, without clock times."""
    lines = read_jsonl(folder / "runs" / NAME / "metrics.jsonl")
    return {
        (line["stage"], line["step"], "loss" in line): {k: v for k, v in line.items() if k not in CLOCK} for line in lines
    }


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / STUDENT / "checkpoints").glob("step-*"))


def assert_equal(one: Any, other: Any, where: str) -> None:
    """Equal in every value, bit by bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def assert_same_run(whole: Path, folder: Path) -> None:
    """Last checkpoint (parameters, optimizer, random states, position), export and every logged number are equal."""
    states, exports = [], []
    for place in (whole, folder):
        checkpoint = place / STUDENT / "checkpoints" / f"step-{STUDENT_STEPS:06d}"
        check_seal(checkpoint)
        state = torch.load(checkpoint / "state-rank-0.pt", weights_only=True)
        loop = json.loads((checkpoint / "state.json").read_text())
        states.append({**state, "loop": {k: v for k, v in loop.items() if k not in CLOCK}})
        exports.append({p.name: p.read_bytes() for p in (place / STUDENT / "export").iterdir()})
    assert_equal(*states, "checkpoint")
    assert states[0]["optimizer"]["state"]
    assert exports[0] == exports[1]
    assert losses(whole) == losses(folder)


@pytest.mark.parametrize(
    "stops", [(4,), (6, 8), (1, 2, 5)], ids=["mid-epoch", "epoch's end and last step", "three times in one epoch"]
)
def test_stop_and_resume_is_bit_equal(whole: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    command = ("run", str(with_teacher(whole, tmp_path)))
    for stop in stops:
        code, output = processes.run(tmp_path, *command, prepare=partial(processes.watch, ids_file(tmp_path), stop))
        assert (code, f"stopped and saved at step {stop} of {STUDENT_STEPS}" in output) == (75, True), output
        assert steps(tmp_path)[-1] == stop
        command = ("resume", str(tmp_path / "runs" / NAME))
    code, output = processes.run(tmp_path, *command, prepare=partial(processes.watch, ids_file(tmp_path)))
    assert (code, f"resumed at step {stops[-1]}" in output) == (0, True), output
    assert_same_run(whole, tmp_path)
    ids = [read_lines(Path(ids_file(place))) for place in (whole, tmp_path)]
    assert ids[0][TEACHER_STEPS:] == ids[1]


def read_lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


def test_an_epoch_has_every_example_once(whole: Path) -> None:
    drawn = [json.loads(line) for line in read_lines(Path(ids_file(whole)))]
    epoch = [example for batches in drawn[TEACHER_STEPS:][:6] for batch in batches for example in batch]
    assert sorted(epoch) == list(range(48))
    assert drawn[TEACHER_STEPS] != drawn[TEACHER_STEPS + 6]


def test_kills_while_saving_fall_back_to_the_last_sealed_checkpoint(whole: Path, tmp_path: Path) -> None:
    """One run killed at six points of its saves, restarted each time (F04), each time at the checkpoint sealed last."""
    file = with_teacher(whole, tmp_path)
    checkpoints = tmp_path / STUDENT / "checkpoints"
    for point, sealed in [
        ("before-shard@3", 0),
        ("after-shard@3", 0),
        ("after-rename@3", 3),
        ("before-manifest@6", 3),
        ("after-manifest@6", 3),
        ("while-pruning@3", 6),
    ]:
        if point.startswith("while-pruning"):
            write_yaml(tmp_path, stages={"student": {"keep": 1}})
        before = newest_sealed(checkpoints).path
        code, output = processes.run(tmp_path, "run", str(file), environment={"MTKD_TEST_KILL_AT": point})
        assert code == -9, output
        assert ("resumed" not in output) if before is None else (f"from {before.name}" in output), (point, output)
        after = newest_sealed(checkpoints)
        assert (after.manifest.get("step", 0), after.skipped) == (sealed, []), point
    code, output = processes.run(tmp_path, "run", str(write_yaml(tmp_path)))
    assert (code, "resumed at step 6" in output) == (0, True), output
    assert_same_run(whole, tmp_path)
    assert [p.name for p in checkpoints.iterdir() if p.name[0] == "."] == []  # nothing half is left behind
