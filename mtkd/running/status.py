"""Read the state of a run from its folder alone, for `mtkd status`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mtkd.config import RunConfig
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.jsonlines import readable_jsonl
from mtkd.engine.lock import holder
from mtkd.engine.notes import Done
from mtkd.engine.runyaml import own_config
from mtkd.engine.seal import newest_sealed


def status(path: Path) -> dict[str, Any]:
    """Stages with their state (done, started, waiting), last step, newest sealed checkpoint, and the process at work.

    A step of a cache stage is a shard. Instead of a checkpoint it shows its caches.
    """
    run = RunDir.open(path)
    config = own_config(run)
    logged: dict[str, dict[str, Any]] = {}
    for line in readable_jsonl(run.metrics_file)[0]:
        if "loss" in line or "examples" in line:  # a line of training, or of a cache
            logged[str(line.get("stage"))] = line
    stages = [
        _stage(name, run.stage(position, name), logged.get(name, {})) for position, name in enumerate(config.stages, 1)
    ]
    return {"run": str(path), "held_by": holder(run.lock_file) or "no process", "stages": stages}


def is_finished(config: RunConfig, before: int) -> bool:
    """Whether a call of `run`, begun after `mark_of` returned `before`, has done everything."""
    folder = RunDir(config.folder)
    stages = [folder.stage(i, name) for i, name in enumerate(config.stages, 1)]
    return mark_of(config) != before and all(stage.done() for stage in stages) and folder.report_file.is_file()


def mark_of(config: RunConfig) -> int:
    """A number that changes when a run starts."""
    file = RunDir(config.folder).environment_file
    return file.stat().st_mtime_ns if file.exists() else 0


def _stage(name: str, folder: StageDir, line: dict[str, Any]) -> dict[str, Any]:
    record = folder.done()
    if record is not None:
        return {
            "stage": name,
            "state": "done",
            "step": record.steps,
            "seconds": round(record.seconds, 1),
            "checkpoint": _caches(record) or "-",
        }
    newest = newest_sealed(folder.checkpoints)
    return {
        "stage": name,
        "state": "started" if line or newest.path or folder.partial.is_dir() else "waiting",
        "step": line.get("step", 0),
        "seconds": line.get("seconds", 0.0),
        "checkpoint": newest.path.name if newest.path else "none",
    }


def _caches(record: Done) -> str:
    """The caches of a cache stage, in a few words; "" for another stage."""
    sizes = {name: (float(f["bytes"]), float(f["bytes_per_position"])) for name, f in record.caches.items()}
    return "; ".join(f"{name}: {size / 1e6:,.1f} MB, {each:.0f} B each" for name, (size, each) in sizes.items())
