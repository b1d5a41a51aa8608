"""metrics.jsonl after kills: every step stands once, in order, and nothing that was logged is lost."""

from __future__ import annotations

import json
import random
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
from tiny_run import NAME, ids_file, with_teacher

from mtkd.engine.jsonlines import append_jsonl, read_jsonl, rewind

shared = pytest.mark.xdist_group("runs")  # they share an undisturbed run
METRICS, STUDENT = f"runs/{NAME}/metrics.jsonl", f"runs/{NAME}/stages/02-student"


def session(file: Path, first: int, last: int, mark: int) -> None:
    """What a session logs of the steps of a stage: a line each, and scores of every third."""
    for step in range(first, last + 1):
        append_jsonl(file, {"stage": "s", "step": step, "loss": mark})
        if step % 3 == 0:
            append_jsonl(file, {"stage": "s", "step": step, "validation/loss": mark})


def test_random_kills_and_resumes_leave_every_step_once(tmp_path: Path) -> None:
    """Law: after any sessions that began at a saved step, the lines are those of one session without a kill."""
    chance = random.Random(3)
    for _ in range(60):
        file = tmp_path / "metrics.jsonl"
        file.write_text('{"stage": "before", "step": 9}\n')
        saved = reached = 0
        made_by: dict[int, int] = {}
        for mark in range(chance.randint(1, 5)):
            saved = chance.randint(0, reached)
            assert rewind(file, "s", saved) == saved
            reached = saved + chance.randint(0, 6)
            session(file, saved + 1, reached, mark)
            made_by |= dict.fromkeys(range(saved + 1, reached + 1), mark)
            if chance.random() < 0.5:
                file.write_bytes(file.read_bytes() + b'{"stage": "s", "st')
        append_jsonl(file, {"stage": "after", "step": 1})
        lines = read_jsonl(file)
        assert [lines[0]["stage"], lines[-1]["stage"]] == ["before", "after"]
        losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
        assert [line["step"] for line in lines if "loss" in line] == list(range(1, reached + 1))
        assert [line["step"] for line in lines if "validation/loss" in line] == list(range(3, reached + 1, 3))
        assert losses == {step: made_by[step] for step in losses}


def test_a_file_in_which_steps_stand_twice_is_put_right(tmp_path: Path) -> None:
    """Law: of steps that an older version logged twice, what came later counts; what is no line of ours stays."""
    file = tmp_path / "metrics.jsonl"
    session(file, 1, 7, 0)
    session(file, 5, 9, 1)
    file.write_bytes(file.read_bytes() + b"not ours\n")
    assert rewind(file, "s", 8) == 8
    *ours, other = file.read_text().splitlines()
    lines = [json.loads(line) for line in ours]
    assert [(x["step"], x["loss"]) for x in lines if "loss" in x] == [(s, int(s > 4)) for s in range(1, 9)]
    assert [(x["step"], x["validation/loss"]) for x in lines if "loss" not in x] == [(3, 0), (6, 1)]
    assert other == "not ours"
    before = file.stat().st_ino
    assert rewind(file, "s", 8) == 8
    assert file.stat().st_ino == before, "an untouched file is not written again"


def without_clock(folder: Path) -> list[dict[str, Any]]:
    lines = read_jsonl(folder / METRICS)
    return [{key: value for key, value in line.items() if key not in ("time", "seconds")} for line in lines]


@shared
@pytest.mark.parametrize("step", [2, 5, 7])
def test_a_killed_run_logs_what_an_undisturbed_one_does(step: int, whole: Path, tmp_path: Path) -> None:
    """Law: kill -9 at a step, also with half a line written, and resume: the same lines, each once, in order."""
    command = ("run", str(with_teacher(whole, tmp_path)))
    kill = partial(processes.watch, ids_file(tmp_path), step, signal.SIGKILL)
    code, output = processes.run(tmp_path, *command, prepare=kill)
    assert code == -signal.SIGKILL, output
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"stage": "student", "step": 8, "loss": 1.0}\n{"stage": "student", "ste')
    code, output = processes.run(tmp_path, *command)
    assert code == 0, output
    assert without_clock(tmp_path) == without_clock(whole)


@shared
def test_a_checkpoint_that_is_passed_over_takes_its_lines_along(whole: Path, tmp_path: Path) -> None:
    command = ("run", str(with_teacher(whole, tmp_path)))
    shutil.copytree(whole / STUDENT / "checkpoints", tmp_path / STUDENT / "checkpoints")
    shutil.copy(whole / METRICS, tmp_path / METRICS)
    (tmp_path / STUDENT / "checkpoints/step-000008/state-rank-0.pt").write_bytes(b"")
    code, output = processes.run(tmp_path, *command)
    assert (code, "resumed at step 6" in output) == (0, True), output
    assert without_clock(tmp_path) == without_clock(whole)
