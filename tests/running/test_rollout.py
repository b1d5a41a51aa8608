"""Rollouts in whole runs: nothing is written at share 0; stopped, killed and resumed they write the same."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_ranks import STOPPED, Job, do, write_runs
from rollout_runs import made, rollout_config, student_again, write_run

import mtkd
from mtkd.config.read import load_config
from mtkd.data.batch import Batch
from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.seal import check_seal, newest_sealed
from mtkd.engine.testing import RankError, run_distributed
from mtkd.errors import DataError, Preempted
from mtkd.running import console
from mtkd.running.build import BuiltStage
from mtkd.running.rollout import Rollout

ROLLOUT = {"share": 0.5, "reuse": 3, "per_prompt": 2}
"""Windows of steps 1 to 3 and 4 to 6; checkpoints after steps 2, 4 and 6."""
STUDENT = "runs/tiny/stages/02-student"
CE = [{"feature": "logits", "loss": "reverse_kl"}, {"feature": "logits", "loss": "ce", "target": "labels"}]

pytestmark = pytest.mark.xdist_group("rollouts")  # they share an undisturbed run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rollouts")
    mtkd.run(rollout_config(folder, ROLLOUT, student={"match": CE}))
    return folder


def test_share_0_is_the_run_without_a_rollout(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: to the bit, in the exported weights and every number of the log; the student need not be able to write."""
    monkeypatch.setattr("mtkd.running.build.check_writing", lambda *_: pytest.fail("asked to write"))
    runs = []
    for name, rollout in (("none", None), ("zero", {"share": 0.0, "per_prompt": 3, "reuse": 2})):
        mtkd.run(student_again(whole, tmp_path / name, rollout))
        runs.append(made(tmp_path / name))
    assert runs[0] == runs[1]
    assert made(whole)[0] != runs[0][0]


def test_the_log_says_what_was_written(whole: Path) -> None:
    """Law: the columns of a line follow from the texts: 4 of 8 examples, 2 completions each, of 1 to 6 tokens."""
    lines = [x for x in read_jsonl(whole / "runs/tiny/metrics.jsonl") if "rollout/learning_seconds" in x]
    assert len(lines) == 6
    for number, line in enumerate(lines):
        assert line["rollout/scoring_seconds"] > 0 < line["rollout/learning_seconds"]
        assert (line["rollout/writing_seconds"] > 0) == (number % 3 == 0) == ("rollout/length" in line)
        if number % 3 == 0:
            assert 1 <= line["rollout/length"] <= 6
            assert 0 <= line["rollout/cut"] <= 1
            tokens = line["rollout/length"] * 8
            assert line["rollout/tokens_per_second"] == pytest.approx(tokens / line["rollout/writing_seconds"])


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int, what: Callable[[], None]) -> None:
    """Do something in the middle of writing the texts of the `at`-th window."""
    write, calls = Rollout._write, []

    def disturbed(self: Rollout, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            what()
        return write(self, *args)

    monkeypatch.setattr(Rollout, "_write", disturbed)


def test_stopped_while_writing_and_resumed_inside_a_window(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: SIGTERM while writing, then a stop in the middle of a window: the same bits as never stopped."""
    config = student_again(whole, tmp_path, ROLLOUT, student={"match": CE})
    with monkeypatch.context() as patch:
        interrupt(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Preempted, match="saved at step 4 of 6"):
            mtkd.run(config)
    checkpoint = tmp_path / "runs/tiny/stages/02-student/checkpoints/step-000004"
    assert "rollout-rank-0.pt" in check_seal(checkpoint)["files"]
    micro_batches = BuiltStage.micro_batches
    with monkeypatch.context() as patch:

        def stop(self: BuiltStage, step: int) -> list[Batch]:
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)
            return micro_batches(self, step)

        patch.setattr(BuiltStage, "micro_batches", stop)
        with pytest.raises(Preempted, match="saved at step 5 of 6"):
            mtkd.run(load_config(tmp_path / "run.yaml"))
    mtkd.run(load_config(tmp_path / "run.yaml"))
    assert made(tmp_path) == made(whole)


def test_packed_rows_learn_the_same_from_the_same_texts(whole: Path, tmp_path: Path) -> None:
    """Law: a student that learns on packed rows writes on padded ones: equal lines of the log to float32's rounding."""
    lines = []
    for packing in (False, True):
        batch = {"sequences": 8, "packing": packing}
        folder = tmp_path / str(packing)
        rows = [*CE, {"feature": "logits", "loss": "policy_gradient"}]
        mtkd.run(student_again(whole, folder, ROLLOUT, student={"batch": batch, "match": rows}))
        lines.append([line for line in made(folder)[1] if "loss" in line])
    assert [line["tokens"] for line in lines[0]] == [line["tokens"] for line in lines[1]]
    for padded, packed in zip(*lines, strict=True):
        assert packed == pytest.approx(padded, rel=1e-3, abs=1e-5)


class Killed(BaseException):
    """Ends a process in a test as kill -9 does: nothing is written after it."""


def kill() -> None:
    raise Killed


def test_killed_while_writing(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a kill in the second window goes back to the middle of the first one, and makes the same bits."""
    config = student_again(whole, tmp_path, ROLLOUT, student={"match": CE})
    with monkeypatch.context() as patch:
        interrupt(patch, 2, kill)
        with pytest.raises(Killed):
            mtkd.run(config)
    mtkd.run(load_config(tmp_path / "run.yaml"))
    assert made(tmp_path) == made(whole)


def test_another_number_of_processes_cannot_go_on_inside_a_window(tmp_path: Path) -> None:
    """Law: texts of two ranks are refused by one, with what to do; at a window's end there are none."""
    rollout = Rollout.__new__(Rollout)
    rollout._config = load_config(write_run(tmp_path, ROLLOUT)).stages["student"].rollout  # type: ignore[assignment]
    rollout._engine = type("Engine", (), {"dist": mtkd.engine.dist.Dist()})()  # type: ignore[assignment]
    for rank in range(2):
        torch.save([], tmp_path / f"rollout-rank-{rank}.pt")
    with pytest.raises(DataError, match="go on with 2 processes"):
        rollout.load(tmp_path, 4)
    rollout.load(tmp_path, 6)


@pytest.mark.slow
@pytest.mark.xdist_group("sharded-rollouts")
def test_ranks_that_are_stopped_or_killed_while_writing_make_the_same_bits(tmp_path: Path) -> None:
    """Law: ZeRO 0, 2 and 3 on two processes; the first two stop inside a window, the last falls back to one."""
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    jobs = [Job(job.zero_stage) for job in STOPPED]
    write_runs(whole, jobs)
    write_runs(disturbed, STOPPED)
    assert run_distributed(do, 2, str(whole), jobs, timeout=900) == [["done"] * 3] * 2
    with pytest.raises(RankError, match="rank 0 ended with exit code -9"):
        run_distributed(do, 2, str(disturbed), STOPPED, timeout=900)
    saved = {job.name: newest_sealed(disturbed / job.name / STUDENT / "checkpoints").manifest["step"] for job in jobs}
    assert saved == {"zero-0": 4, "zero-2": 4, "zero-3": 2}
    assert run_distributed(do, 2, str(disturbed), jobs, timeout=900) == [["done"] * 3] * 2
    for job in jobs:
        assert made(disturbed / job.name) == made(whole / job.name)
    lines = [made(whole / job.name)[1] for job in jobs]
    for others in lines[1:]:  # sharding changes roundings alone: the same texts, the same losses
        for line, other in zip(lines[0], others, strict=True):
            assert other == pytest.approx(line, rel=1e-3)


def test_writing_that_takes_long_says_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: a plain line each 10 seconds, on the main rank alone; nothing of what is short."""
    clock = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    for main in (True, False):
        clock[0] = 0.0
        progress = console.StageProgress("student", 6, 2, main)
        for token in range(1, 31):
            clock[0] += 0.5
            progress.writing(token, 40, 8 * token)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert lines == ["  student: step 3/6  writing: token 21 of 40, 168 in all"]


def test_the_longest_text_and_all_tokens_are_shown(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: after every token of a window; the last call has what the log says was written."""
    seen: list[tuple[int, int, int]] = []
    monkeypatch.setattr(console.StageProgress, "writing", lambda self, *told: seen.append(told))
    mtkd.run(student_again(whole, tmp_path, {"max_new_tokens": 5}, student={"steps": 1}))
    line = next(x for x in read_jsonl(tmp_path / "runs/tiny/metrics.jsonl") if "rollout/length" in x)
    assert [longest for longest, _, _ in seen] == list(range(1, len(seen) + 1))
    assert seen[-1][1:] == (5, round(line["rollout/length"] * 8))
