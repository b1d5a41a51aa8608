"""Runs with rollouts on several ranks, for `run_distributed`: stopped or killed in the middle of writing."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout_runs import write_run

import mtkd.running.run
from mtkd.config.read import load_config
from mtkd.errors import UserError
from mtkd.models.generate import Written
from mtkd.running.rollout import Rollout

ROLLOUT = {"share": 0.75, "reuse": 3, "per_prompt": 2}
ROWS = [{"feature": "logits", "loss": "reverse_kl"}, {"feature": "logits", "loss": "ce", "target": "labels"}]


@dataclass(frozen=True)
class Job:
    """A run in the folder `zero-STAGE`.

    Attributes:
        signal: what a rank gets while it writes the second window, 0 for nothing.
        rank: that rank.
    """

    zero_stage: int
    signal: int = 0
    rank: int = 0

    @property
    def name(self) -> str:
        return f"zero-{self.zero_stage}"


def write_runs(parent: Path, jobs: Sequence[Job]) -> None:
    for job in jobs:
        engine = {"kind": "deepspeed", "processes": 2, "zero_stage": job.zero_stage}
        (parent / job.name).mkdir(parents=True)
        write_run(parent / job.name, ROLLOUT, student={"match": ROWS}, engine=engine)


_write = Rollout._write


def do(parent: str, jobs: Sequence[Job]) -> list[str]:
    """Run the jobs one after the other on this rank; how each ended."""
    mtkd.running.run.write_report = lambda folder: folder / "report.html"
    ends = []
    for job in jobs:
        _disturb(job)
        try:
            mtkd.running.run.run(load_config(Path(parent) / job.name / "run.yaml"))
            ends.append("done")
        except UserError as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


def _disturb(job: Job) -> None:
    calls: list[int] = []

    def write(self: Rollout, *args: Any) -> Written:
        calls.append(1)
        if len(calls) == 2 and job.signal and int(os.environ["RANK"]) == job.rank:
            os.kill(os.getpid(), job.signal)
        written = _write(self, *args)
        (student,) = self._engine.objective.models.values()
        # gathered once for the whole text: no layer's hook has freed its parameters, so no token is a collective
        states = {p.ds_status.name for p in student.parameters() if hasattr(p, "ds_status")}
        assert states == ({"AVAILABLE"} if job.zero_stage == 3 else set())
        return written

    Rollout._write = write  # type: ignore[method-assign]


STOPPED = [Job(0, signal.SIGTERM, rank=1), Job(2, signal.SIGTERM), Job(3, signal.SIGKILL)]
