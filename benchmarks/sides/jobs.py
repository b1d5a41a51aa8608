"""Runs of mtkd as jobs: several worker processes, several runs per process, dependencies, nothing done twice.

A job is a run's configuration as plain values; it is finished when its folder has results.json, and only then.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A run, the folders of the runs whose models or caches it reads, and whether others read its models."""

    config: dict[str, Any]
    needs: tuple[Path, ...] = ()
    used_again: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.config["output"]) / self.config["name"]

    @property
    def finished(self) -> bool:
        return done(self.folder)


def done(folder: Path) -> bool:
    """Whether a run is finished."""
    return (folder / "results.json").exists()


def run_job(job: Job) -> None:
    """One run, in a worker process; of what is not used again its scores are kept alone: a part makes 100 runs."""
    import mtkd
    from mtkd.config import RunConfig

    mtkd.run(RunConfig.model_validate(job.config))
    stages = job.folder / "stages"
    for state in stages.glob("*/checkpoints/step-*/state-rank-0.pt"):
        state.unlink()
    if not job.used_again:
        for weights in stages.glob("*/export/model.safetensors"):
            weights.unlink()


def _end_with_parent() -> None:
    """End this worker when the process that started it is gone: SIGTERM alone makes mtkd save and go on waiting."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def set_environment() -> None:
    """One thread per process and no network; read by the workers when they import torch."""
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")


def work(jobs: Sequence[Job], workers: int, deadline: float) -> None:
    """Run the jobs that are not finished, `workers` at a time, until all are or the time is over.

    Jobs start in the order given, but for those that wait for another one.

    Args:
        deadline: on the monotonic clock; nothing starts after it.
    """
    waiting = [job for job in jobs if not job.finished]
    total, ended, failed = len(waiting), 0, 0
    # A worker makes some runs before a new one takes its place: starting one takes 10 s, and its memory grows slowly.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, max_tasks_per_child=20, initializer=_end_with_parent) as pool:
        running: dict[Future[None], str] = {}
        while waiting or running:
            if time.monotonic() >= deadline and waiting:
                print(f"time is over: {len(waiting)} runs are left for the next call", flush=True)
                waiting = []
            for job in [job for job in waiting if all(map(done, job.needs))][: workers - len(running)]:
                waiting.remove(job)
                running[pool.submit(run_job, job)] = job.config["name"]
            if not running:
                if waiting:
                    print(f"{len(waiting)} runs wait for runs that failed", flush=True)
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                name, error = running.pop(future), future.exception()
                ended += 1
                failed += error is not None
                print(f"{name} {f'failed: {error}' if error else 'ended'}; {total - ended} of {total} left", flush=True)
    if failed:
        sys.exit(f"{failed} runs failed")


def stage_folder(folder: Path, stage: str) -> Path:
    """The folder of a finished run's stage; folders have the stage's number before its name."""
    return next(path for path in (folder / "stages").iterdir() if path.name.partition("-")[2] == stage)


def hits(folder: Path, stage: str = "", file: str = "scores.jsonl") -> list[float] | None:
    """Hits (0 or 1) per test example of a run's scored stage; None when it is not finished.

    Args:
        stage: its name; "" for the only one that is scored.
    """
    if not done(folder):
        return None
    path = stage_folder(folder, stage) / file if stage else next((folder / "stages").glob(f"*/{file}"))
    rows = [json.loads(line) for line in path.open()]
    return [float(row["prediction"] == row["label"]) for row in rows]


def training_seconds(folder: Path, stage: str) -> float | None:
    """Seconds of a finished stage's training."""
    if not done(folder):
        return None
    models: Mapping[str, Any] = json.loads((folder / "results.json").read_text())["models"]
    return float(models[stage]["seconds"]) if stage in models else None
