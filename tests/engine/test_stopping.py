"""SIGTERM and SIGHUP end a run with exit code 75 wherever it stands, and the next call goes on; a killed rank is 71."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import processes
import pytest
from tiny_run import ids_file, write_yaml

from mtkd.engine.folder import RunDir
from mtkd.engine.launch import _exit_code
from mtkd.engine.seal import newest_sealed
from mtkd.engine.stopping import stop_signals
from mtkd.errors import EXIT_DATA, EXIT_LOST, EXIT_PREEMPTED


def stop_in(place: str, number: signal.Signals) -> None:
    """For `processes`: the signal arrives where the function begins."""
    signal.signal(number, signal.SIG_DFL)  # the suite itself may run under nohup
    module, _, name = place.partition(":")
    function = getattr(importlib.import_module(module), name)

    def stopped(*arguments: object, **named: object) -> object:
        os.kill(os.getpid(), number)
        return function(*arguments, **named)

    setattr(importlib.import_module(module), name, stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "place",
    ["mtkd.running.run:specify", "mtkd.running.run:train", "mtkd.running.run:_export", "mtkd.running.run:judge"],
)
def test_a_signal_outside_of_training_ends_the_run(tmp_path: Path, place: str, number: signal.Signals) -> None:
    """While it plans, loads, exports and scores: exit code 75, no traceback; run again, it ends well."""
    file = str(write_yaml(tmp_path))
    code, output = processes.run(tmp_path, "run", file, prepare=partial(stop_in, place, number))
    assert code == EXIT_PREEMPTED, output
    assert f"stopped by {number.name}" in output
    assert "Traceback" not in output
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output


def hang_up(ids: str) -> None:
    """For `processes`: SIGHUP before the fifth step."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    processes.watch(ids, 5, signal.SIGHUP)


def test_a_hang_up_in_training_is_saved(tmp_path: Path) -> None:
    file = str(write_yaml(tmp_path))
    code, output = processes.run(tmp_path, "run", file, prepare=partial(hang_up, ids_file(tmp_path)))
    assert code == EXIT_PREEMPTED, output
    assert "stopped and saved at step" in output
    (run,) = (tmp_path / "runs").iterdir()
    assert newest_sealed(RunDir(run).stage(2, "student").checkpoints).path is not None


def insist(numbers: tuple[signal.Signals, ...]) -> None:
    """For `processes`: signals arrive one after another while a checkpoint is written."""
    from mtkd.engine.torch_engine import TorchEngine

    write, sent = TorchEngine.save, list[signal.Signals]()
    for number in numbers:
        signal.signal(number, signal.SIG_DFL)

    def save(engine: TorchEngine, folder: Path) -> None:
        for number in numbers[len(sent) :]:
            os.kill(os.getpid(), number)
            sent.append(number)
        write(engine, folder)

    TorchEngine.save = save  # type: ignore[method-assign]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_who_insists_while_a_checkpoint_is_written_does_not_lose_it(tmp_path: Path, number: signal.Signals) -> None:
    """Three signals during the save of step 3: it is sealed, the exit code is 75, and the next call goes on from it."""
    file = str(write_yaml(tmp_path))
    code, output = processes.run(tmp_path, "run", file, prepare=partial(insist, (number,) * 3))
    assert code == EXIT_PREEMPTED, output
    assert "Traceback" not in output
    (run,) = (tmp_path / "runs").iterdir()
    assert newest_sealed(RunDir(run).stage(1, "teacher").checkpoints).path is not None
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output
    assert "resumed at step 3" in output


@contextmanager
def handled(number: signal.Signals, handler: signal.Handlers) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def test_an_ignored_hang_up_stays_ignored() -> None:
    """What `nohup` sets before it starts a command."""
    with handled(signal.SIGHUP, signal.SIG_IGN):
        assert stop_signals() == (signal.SIGTERM,)
    with handled(signal.SIGHUP, signal.SIG_DFL):
        assert stop_signals() == (signal.SIGTERM, signal.SIGHUP)


def test_a_rank_that_a_signal_ended_is_lost() -> None:
    """DeepSpeed's launcher exits with -9, of which the system makes 247; its other codes are those of a rank."""
    assert [_exit_code(code) for code in (256 - signal.SIGKILL, 256 - signal.SIGSEGV, -signal.SIGKILL)] == [
        EXIT_LOST
    ] * 3
    assert [_exit_code(code) for code in (0, EXIT_DATA, EXIT_LOST, EXIT_PREEMPTED)] == [0, 3, EXIT_LOST, EXIT_PREEMPTED]
