"""The `mtkd` command in real processes that can be stopped and killed, without paying for its imports each time.

A fork server imports everything once; each command, and each rank of `run_distributed`, is a fresh fork of it, so
nothing that one run leaves in memory (random states, caches, handlers) reaches another one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from forked_python import ForkedPython, run_main

if TYPE_CHECKING:
    from mtkd.data.batch import Batch

PRELOADED = (
    *(
        "mtkd.cli.app",
        "mtkd.running.run",
        "mtkd.evaluate.report",
        "mtkd.evaluate.report.plots",
        "datasets",
        "torch.utils.tensorboard",
    ),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.auto.modeling_auto", "matplotlib.pyplot"),
    *("datasets.io.json", "deepspeed", "scipy.stats", "scipy.io", "torch._dynamo", "accelerate"),
    *("torch.distributed", "torch.utils.cpp_extension", "mtkd.engine.deepspeed_engine", "scipy.optimize", "pytest"),
    # what DeepSpeed imports while it makes an engine, torch's compiler among it: 2 s in every rank
    *("deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._inductor.compile_fx"),
    "deepspeed.launcher.launch",
    "preloaded",  # last
)
_TIMEOUT = 1200  # seconds; ten times what the longest of these runs takes: the machine may be busy
_started: list[ForkServerProcess] = []


@dataclass
class Command:
    """A command that was started: its process, and the file that its output goes to."""

    process: ForkServerProcess
    file: Path

    @property
    def output(self) -> str:
        """Everything written so far."""
        return self.file.read_text()

    def wait(self) -> int:
        """Its exit code; minus the signal's number when one ended it."""
        self.process.join(_TIMEOUT)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.output)
        return self.process.exitcode

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return when `condition` holds; raises when the command ends or takes too long before it does."""
        limit = time.monotonic() + _TIMEOUT
        while not condition():
            if self.process.exitcode is not None or time.monotonic() > limit:
                raise AssertionError(f"waited in vain; exit code {self.process.exitcode}\n{self.output}")
            time.sleep(0.005)


def start(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    report: bool = False,
    executes: bool = False,
    program: Sequence[str] = (),
) -> Command:
    """Start ``mtkd ARGUMENTS``, its output in a file of `folder`.

    Args:
        environment: variables that are set for it.
        prepare: module-level function called in the process first, to set a trap in it.
        report: draw the report as well, which takes longer than a tiny run.
        executes: launchers and ranks below it are new interpreters, as for a user, and not forks (`forked_python.py`).
        program: arguments of an interpreter that runs something else than `mtkd`: ``("-m", MODULE)`` or ``(FILE,)``.
    """
    file = folder / f"output-{time.monotonic_ns()}.txt"
    file.touch()
    settings = Settings(str(file), tuple(program), dict(environment or {}), prepare, report, executes)
    process = get_context("forkserver").Process(target=_command, args=(arguments, settings))
    process.start()
    _started.append(process)
    return Command(process, file)


def run(
    folder: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
    report: bool = False,
    executes: bool = False,
    program: Sequence[str] = (),
) -> tuple[int, str]:
    """Exit code and output of ``mtkd ARGUMENTS``; see `start`."""
    command = start(
        folder,
        *arguments,
        environment=environment,
        prepare=prepare,
        report=report,
        executes=executes,
        program=program,
    )
    return command.wait(), command.output


def assert_refused(folder: Path, command: tuple[str, ...], code: int, *texts: str) -> None:
    """The command ends with this exit code and these texts, and without a traceback."""
    found, output = run(folder, *command)
    assert found == code, output
    assert "Traceback" not in output
    for text in texts:
        assert text in output, output


def watch(ids: str, stop: int = 0, number: signal.Signals = signal.SIGTERM) -> None:
    """For `prepare`: write the example numbers of every step to the file `ids`; a signal before the step `stop`."""
    from tiny_run import EPOCH_STEPS

    from mtkd.data.sampler import TrainStream

    draw = TrainStream.__next__

    def follow(stream: TrainStream) -> list[Batch]:
        batches = draw(stream)
        with open(ids, "a") as file:
            file.write(json.dumps([batch.keys.tolist() for batch in batches]) + "\n")
        state = stream.state()
        if state["epoch"] * EPOCH_STEPS + state["position"] == stop:
            os.kill(os.getpid(), number)
        return batches

    TrainStream.__next__ = follow  # type: ignore[method-assign]


def kill_all() -> None:
    """Kill what a failed test has left running, with everything it started itself."""
    while _started:
        process = _started.pop()
        if process.exitcode is not None:
            continue
        with suppress(psutil.NoSuchProcess):
            for below in psutil.Process(process.pid).children(recursive=True):
                below.kill()
        process.kill()


@dataclass(frozen=True)
class Settings:
    """What a command's process does before it runs the command; see `start`."""

    file: str
    program: tuple[str, ...]
    environment: dict[str, str]
    prepare: Callable[[], None] | None
    report: bool
    executes: bool


def _command(arguments: tuple[str, ...], settings: Settings) -> None:
    descriptor = os.open(settings.file, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ.update(settings.environment)
    if not settings.report:
        import mtkd.evaluate.report
        import mtkd.running.run

        mtkd.evaluate.report.write_report = mtkd.running.run.write_report = lambda folder: folder / "report.html"
    if not settings.executes:
        subprocess.Popen = ForkedPython  # type: ignore[misc]
    if settings.prepare is not None:
        settings.prepare()
    if settings.program:
        run_main([*settings.program, *arguments])
        return
    sys.argv = ["mtkd", *arguments]
    from mtkd.cli.app import main

    main()
