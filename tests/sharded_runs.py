"""What the ranks of the DeepSpeed resume tests do: whole runs in two processes, stopped and killed where a test says."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_run import EPOCH_STEPS, NAME, write_yaml

import mtkd.runner
from mtkd.build import BuiltStage, Workshop
from mtkd.configfile import load_config
from mtkd.data.sampler import TrainStream
from mtkd.errors import Preempted
from mtkd.rundir import StageDir

PROBE = torch.arange(3, 23).reshape(2, 10)  # token ids


def folder_of(parent: str, zero_stage: int) -> Path:
    return Path(parent) / f"zero-{zero_stage}"


def write_runs(parent: Path, zero_stages: Sequence[int]) -> str:
    """The runs' YAML files below `parent`; the teacher's output head is its own, the student's is its embedding."""
    for zero_stage in zero_stages:
        folder = folder_of(str(parent), zero_stage)
        folder.mkdir()
        engine = {"kind": "deepspeed", "processes": 2, "zero_stage": zero_stage}
        write_yaml(folder, engine=engine, stages={"teacher": {"student": {"tie_embeddings": False}}})
    return str(parent)


def run_all(parent: str, zero_stages: Sequence[int], stop: int = 0, kill: str = "") -> list[str]:
    """One run per ZeRO stage, each in its folder; how each ended.

    Args:
        stop: SIGTERM to rank 1 alone before this step of the student.
        kill: fault point at which the main rank of the last run dies.
    """
    mtkd.runner.write_report = lambda folder: folder / "report.html"
    mtkd.runner._export = _export_and_probe
    ends = []
    for zero_stage in zero_stages:
        config = load_config(folder_of(parent, zero_stage) / "run.yaml")
        if kill and zero_stage == zero_stages[-1]:
            os.environ["MTKD_TEST_KILL_AT"] = kill
        _stop_before(stop)
        try:
            mtkd.runner.run(config)
            ends.append("done")
        except Preempted as error:
            ends.append(str(error))
    return ends


_draw = TrainStream.__next__


def _stop_before(step: int) -> None:
    def draw(stream: TrainStream) -> list:
        batches = _draw(stream)
        state = stream.state()
        if state["epoch"] * EPOCH_STEPS + state["position"] == step and stream._rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches

    TrainStream.__next__ = draw


_export = mtkd.runner._export


def _export_and_probe(shop: Workshop, built: BuiltStage, folder: StageDir) -> None:
    """The export, and beside it the trained student's own logits on fixed ids, computed under the engine."""
    model = built.objective.student.model.eval()
    with torch.no_grad():
        logits = model(PROBE).logits
    if shop.dist.is_main:
        torch.save(logits, folder.path / "probe.pt")
    _export(shop, built, folder)


def student_of(parent: Path, zero_stage: int) -> Path:
    return folder_of(str(parent), zero_stage) / "runs" / NAME / "stages" / "02-student"
