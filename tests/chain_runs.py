"""Tiny chains as whole runs, and a kill at a chosen event of a run: for the tests of chains."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_run import NAME, write_yaml

RUN = f"runs/{NAME}"
_CLOCK = {"time", "seconds"}
_UNLIKE = {"sha256", "seconds", "peak_memory_bytes"}  # of a DONE record: what no two runs have in common

TAKD = ("teacher", "assistant-1", "assistant-2", "assistant-3", "student", "direct")
DGKD = ("teacher", "assistant-1", "assistant-2", "student", "direct")


def takd_file(folder: Path, **chain: Any) -> Path:
    """Three rungs between a teacher of three layers and a student of one; `chain` changes the chain."""
    rungs = [{"layers": 2, "width": 16, "heads": 2}, {"layers": 1, "width": 16, "heads": 2}]
    rungs.append({"layers": 1, "width": 12, "heads": 2})
    return _chain_file(folder, {"mode": "takd", "rungs": rungs, **chain})


def dgkd_file(folder: Path, **chain: Any) -> Path:
    """Two derived rungs; every stage learns from all before it."""
    return _chain_file(folder, {"mode": "dgkd", "num_rungs": 2, "weighting": "drop", **chain})


def _chain_file(folder: Path, chain: dict[str, Any]) -> Path:
    written = {
        "teachers": ["stage:teacher"],
        "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.1},
        "steps": 4,
        "batch": {"sequences": 8},
        "optimizer": {"lr": 1e-2},
        "save_every": 2,
        **chain,
    }
    return write_yaml(
        folder,
        stages={"teacher": {"student": {"layers": 3}}, "student": None},
        chain=written,
        evaluate={"ensembles": [], "comparisons": []},
    )


def copied(whole: Path, folder: Path) -> None:
    """Data and run of `whole`, in `folder`."""
    for name in ("data", "runs"):
        shutil.copytree(whole / name, folder / name)


def stage_folder(folder: Path, name: str) -> Path:
    (found,) = [path for path in (folder / RUN / "stages").iterdir() if path.name[3:] == name]
    return found


def exported(folder: Path, name: str) -> dict[str, bytes]:
    """The files of a stage's model, with the manifest that lists their digests."""
    return {path.name: path.read_bytes() for path in (stage_folder(folder, name) / "export").iterdir()}


def outcome(folder: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """What two equal runs have in common: models, scores, DONE records, results, the last line of each metric."""
    found: dict[str, Any] = {}
    for name in names:
        stage = stage_folder(folder, name)
        record = json.loads((stage / "DONE").read_text())
        found[name] = (
            exported(folder, name),
            (stage / "scores.jsonl").read_text(),
            {key: value for key, value in record.items() if key not in _UNLIKE},
        )
    lines = [json.loads(line) for line in (folder / RUN / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        key = ("metrics", line["stage"], line["step"], "loss" in line)
        found[str(key)] = {k: v for k, v in line.items() if k not in _CLOCK}
    results = json.loads((folder / RUN / "results.json").read_text())
    for model in results["models"].values():
        model.pop("seconds", None)
    del results["sha256"], results["inputs"]  # they cover the seconds
    return found | {"results": results}


def count_events(file: str, kill_at: int = 0) -> None:
    """For `processes.run(prepare=...)`: kill this process before its event number `kill_at`, from 1.

    Events are optimizer steps, files and folders brought to the disk, and renames: what a kill can come between. Their
    number goes to `file`.
    """
    from mtkd.data.sampler import TrainStream

    seen = [0]

    def counted(action: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **named: Any) -> Any:
            seen[0] += 1
            Path(file).write_text(str(seen[0]))
            if seen[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return action(*arguments, **named)

        return do

    os.fsync, os.rename, os.replace = counted(os.fsync), counted(os.rename), counted(os.replace)
    TrainStream.__next__ = counted(TrainStream.__next__)  # type: ignore[method-assign]
