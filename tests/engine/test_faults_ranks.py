"""One rank fails, dies or freezes, or the launcher dies: the others end soon, with the reason first (F11, F12, F13)."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import processes
import psutil
import pytest
import watched_rank
from tiny_run import NAME, write_yaml

from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.launch import _to_ranks
from mtkd.engine.seal import newest_sealed
from mtkd.errors import EXIT_LOST

SOON = 200  # seconds in which the others must be gone: 5 to 15 on an idle machine, an hour without the watch


@dataclass(frozen=True)
class Ended:
    """How a small group ended: exit codes, seconds from the fault to the last end, what was said, the folder."""

    codes: list[int | None]
    seconds: float
    output: str
    folder: Path

    def pid(self, rank: int) -> str:
        return (self.folder / f"pid-{rank}").read_text()


def group(folder: Path, fault: str, bad: int, *, timeout: float = 3600, ranks: int = 2) -> Callable[[], Ended]:
    """Start some watched ranks, the rank `bad` with a fault; the result waits for all of them."""
    folder.mkdir(exist_ok=True)
    started = [
        get_context("forkserver").Process(target=watched_rank.rank, args=(folder, fault, bad, timeout, rank, ranks))
        for rank in range(ranks)
    ]
    for process in started:
        process.start()

    def wait() -> Ended:
        limit = time.monotonic() + 900
        for process in started:
            process.join(limit - time.monotonic())
        seconds_since_epoch = time.time()
        codes = [process.exitcode for process in started]
        for process in started:
            process.kill()
        text = (folder / "output").read_text()
        begun = float(next(line for line in text.splitlines() if line.endswith("fault")).split()[0])
        return Ended(codes, seconds_since_epoch - begun, text.split("fault\n", 1)[1], folder)

    return wait


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 1])
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path, bad: int) -> None:
    """kill -9 of the main rank or of another: the rest ends with EXIT_LOST, first says who died."""
    ended = group(tmp_path, "kill", bad)()
    assert ended.codes[bad] == -signal.SIGKILL
    assert ended.codes[1 - bad] == EXIT_LOST, ended.output
    assert ended.seconds < SOON
    assert ended.output.startswith(f"mtkd: rank {bad} (pid {ended.pid(bad)} on "), ended.output
    assert "ended without a word" in ended.output.splitlines()[0]
    assert "Traceback" not in ended.output
    assert "ended without a word" in (tmp_path / f"logs/rank-{1 - bad}.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        ("exit", [EXIT_LOST, 3, EXIT_LOST], "ended without a word"),
        ("bug", [70, 70, 70], "failed: ValueError: a bug of this rank"),
        ("refused", [3, 3, 3], "failed: shard 1: a shard is missing"),
    ],
)
def test_the_reason_of_one_rank_reaches_all(tmp_path: Path, fault: str, codes: list[int], told: str) -> None:
    """Among three, so that one rank is told by another than the one that failed."""
    ended = group(tmp_path, fault, 1, ranks=3)()
    assert ended.codes == codes, ended.output
    assert ended.seconds < SOON
    by_others = f"mtkd: rank 1 (pid {ended.pid(1)} on "
    assert [told in line for line in ended.output.splitlines() if line.startswith(by_others)] == [True, True]
    if fault == "bug":
        assert "ValueError: a bug of this rank" in (tmp_path / "logs/rank-1.log").read_text()
        assert ended.output.count("Traceback") == 1  # where it happened, and nowhere else


@pytest.mark.slow
def test_a_frozen_rank_ends_the_run_with_the_stacks_of_all(tmp_path: Path) -> None:
    """One that is stopped or sleeps, the main one and another: three groups at the same time, since each waits."""
    limit = 4.0  # a rank of a busy machine still takes a step within it
    cases = [("stop", 1), ("stop", 0), ("asleep", 1)]
    waits = [group(tmp_path / f"{fault}-{bad}", fault, bad, timeout=limit) for fault, bad in cases]
    for (fault, bad), wait in zip(cases, waits, strict=True):
        ended = wait()
        assert ended.codes == [EXIT_LOST, EXIT_LOST], ended.output
        assert limit < ended.seconds < SOON
        stacks = [(ended.folder / f"logs/rank-{rank}.stacks").read_text() for rank in (0, 1)]
        assert all("watched_rank.py" in text for text in stacks)
        assert "in sum" in stacks[1 - bad]
        assert fault == "stop" or "in fail" in stacks[bad]  # one that is woken runs on while it writes
        silent = f"no sign of life from rank {bad} (pid {ended.pid(bad)} on "
        assert (silent if fault == "stop" else "all ranks answer") in ended.output, ended.output


@pytest.mark.slow
def test_a_rank_that_works_alone_for_long_is_waited_for(tmp_path: Path) -> None:
    """The other one waits in a collective three times as long as a run may stand still."""
    for ended in [wait() for wait in [group(tmp_path / str(bad), "slow", bad, timeout=3) for bad in (0, 1)]]:
        assert ended.codes == [0, 0], ended.output
        assert ended.output == ""
        assert list((ended.folder / "logs").iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_what_a_rank_says_is_one_write(unbuffered: str) -> None:
    """Lines of several ranks are joined else. A socket of messages shows each write as one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        program = "from mtkd.errors import tell; tell('mtkd: one\\n  do:      two')"
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        subprocess.run([sys.executable, "-c", program], stderr=there, env=environment, timeout=600, check=True)
        assert here.recv(1000) == b"mtkd: one\n  do:      two\n"


# Whole runs


def test_what_a_killed_launcher_leaves_is_ended(tmp_path: Path) -> None:
    """`mtkd.engine.orphans` alone: what was started by a killed child is ended, though it would live for minutes."""
    child = "import subprocess; p = subprocess.Popen(['sleep', '6000']); print(p.pid, flush=True); p.wait()"
    program = f"""
import os, signal, subprocess, sys
from mtkd.engine.orphans import adopting, end_session
with adopting():
    command = [sys.executable, "-c", {child!r}]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    print(child.stdout.readline(), flush=True)
    child.kill()
    child.wait()
    end_session(child.pid)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=True)
    assert not psutil.pid_exists(int(done.stdout))


def test_a_signal_after_the_launcher_has_ended_is_no_error() -> None:
    """Its ranks may still be saving then: whoever presses Ctrl-C must not stop the wait for them."""
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    _to_ranks(launcher, signal.SIGINT)


@pytest.mark.slow
def test_a_killed_rank_and_a_killed_launcher_end_a_run_that_goes_on_later(tmp_path: Path) -> None:
    """F11, F13 and F16 in one run: kill -9 of a rank, resumed; kill -9 of the launcher; then by another number."""
    engine = {"kind": "deepspeed", "processes": 2, "zero_stage": 2}
    stages = {"teacher": {"steps": 100_000, "save_every": 3}, "student": None}
    evaluate = {"ensembles": [], "comparisons": []}
    file = str(write_yaml(tmp_path, engine=engine, stages=stages, evaluate=evaluate))
    checkpoints = tmp_path / f"runs/{NAME}/stages/01-teacher/checkpoints"

    def ranks() -> list[psutil.Process]:
        """Both ranks of the newest start, as their logs name them."""
        logs = [(tmp_path / f"runs/{NAME}/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
        return [psutil.Process(int(re.findall(r"rank \d of 2, pid (\d+) on", log)[-1])) for log in logs]

    command = processes.start(tmp_path, "run", file)
    command.wait_for(lambda: (checkpoints / "step-000003").exists())
    everybody, begun = ranks(), time.monotonic()
    victim = everybody[1]
    victim.kill()
    assert command.wait() not in (0, 75), command.output
    assert time.monotonic() - begun < SOON
    assert not any(p.is_running() for p in everybody)
    assert f"mtkd: rank 1 (pid {victim.pid} on " in command.output
    assert "Traceback" not in command.output

    command = processes.start(tmp_path, "run", file)
    command.wait_for(lambda: "resumed at step" in command.output)
    everybody = ranks()
    launcher = everybody[0].parent()
    assert launcher is not None
    assert launcher.ppid() == command.process.pid
    launcher.kill()
    assert command.wait() == EXIT_LOST, command.output
    assert not any(p.is_running() for p in everybody)
    found = newest_sealed(checkpoints)
    assert found.path is not None  # the ranks saved when they saw it
    assert found.skipped == []
    steps = [line["step"] for line in read_jsonl(tmp_path / f"runs/{NAME}/metrics.jsonl") if "loss" in line]
    assert steps == sorted(steps)

    wrong = ("run", file, "-o", "engine.processes=1")
    told = "mtkd run FILE -o engine.kind=deepspeed -o engine.processes=2 -o engine.zero_stage=2"
    processes.assert_refused(tmp_path, wrong, 3, "world_size: 2 -> 1", told)
