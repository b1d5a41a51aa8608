"""Whole runs on two DeepSpeed ranks for the resume tests: what each rank does, with the trap of each run."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tiny_run import EPOCH_STEPS, NAME, write_yaml

import mtkd.running.run
from mtkd.config.read import load_config
from mtkd.data.sampler import TrainStream
from mtkd.engine.folder import StageDir
from mtkd.errors import UserError
from mtkd.running.build import BuiltStage
from mtkd.running.context import RunContext

PROBE = torch.arange(3, 23).reshape(2, 10)  # token ids


@dataclass(frozen=True)
class Job:
    """A run in the folder `name`.

    Attributes:
        stop: rank 1 alone gets SIGTERM before this step of the student.
        kill: fault point of `mtkd.engine.seal` at which the main rank dies.
        full_disk: rank 1 cannot write its files.
        lr: learning rate of the first stage, which stops being finite when it is huge.
        early: the student ends early, at a learning rate too high for it, and its best step is exported.
    """

    name: str
    zero_stage: int
    stop: int = 0
    kill: str = ""
    full_disk: bool = False
    lr: float = 1e-2
    early: bool = False


EARLY = {
    "steps": 30,
    "optimizer": {"lr": 0.1, "schedule": "constant", "warmup": 0.0},
    "evaluate_every": 2,
    "early_stop": {"metric": "perplexity", "patience": 2},
    "export": "best",
}


def write_runs(parent: Path, jobs: Sequence[Job]) -> str:
    """The runs' YAML files; the teacher's output head is its own matrix, the student's is its embedding."""
    for job in jobs:
        (parent / job.name).mkdir(parents=True)
        engine = {"kind": "deepspeed", "processes": 2, "zero_stage": job.zero_stage}
        teacher = {"student": {"tie_embeddings": False}, "optimizer": {"lr": job.lr}}
        write_yaml(parent / job.name, engine=engine, stages={"teacher": teacher, "student": EARLY if job.early else {}})
    return str(parent)


def student_of(parent: Path, name: str) -> Path:
    """The folder of a run's second stage."""
    return parent / name / "runs" / NAME / "stages" / "02-student"


def do(parent: str, jobs: Sequence[Job]) -> list[str]:
    """Run the jobs one after the other on this rank; how each ended."""
    mtkd.running.run.write_report = lambda folder: folder / "report.html"
    mtkd.running.run._export = _export_and_probe
    ends = []
    for job in jobs:
        _set_traps(job)
        try:
            mtkd.running.run.run(load_config(Path(parent) / job.name / "run.yaml"))
            ends.append("done")
        except UserError as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends


_draw, _export, _write = TrainStream.__next__, mtkd.running.run._export, torch.save


def _set_traps(job: Job) -> None:
    os.environ["MTKD_TEST_KILL_AT"] = job.kill
    rank = int(os.environ["RANK"])

    def draw(stream: TrainStream) -> list:
        batches = _draw(stream)
        state = stream.state()
        if rank == 1 and state["epoch"] * EPOCH_STEPS + state["position"] == job.stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    def write(state: dict, path: str, **options: bool) -> None:
        if rank == 1 and job.full_disk:
            raise OSError(28, "No space left on device")
        _write(state, path, **options)

    TrainStream.__next__, torch.save = draw, write


def _export_and_probe(context: RunContext, built: BuiltStage, folder: StageDir) -> None:
    """The export, and beside it the trained student's own logits on fixed ids, computed under the engine."""
    model = built.objective.student.model.eval()
    with torch.no_grad():
        logits = model(PROBE).logits
    _export(context, built, folder)
    if context.dist.is_main:
        torch.save({"ids": PROBE, "logits": logits}, folder.path / "probe.pt")
