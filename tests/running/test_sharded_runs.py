"""Whole runs with sharded teachers: routed, scored with unequal ranks (F14), beside teachers of other backends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cache_runs import EXACT
from safetensors.torch import load_file
from tiny_run import NAME, tiny_values, write_data

import mtkd.running.run
from mtkd.config.read import load_config
from mtkd.engine.testing import run_distributed

ENGINE = {"kind": "deepspeed", "processes": 2, "zero_stage": 2, "device": "cpu", "precision": "fp32", "threads": 1}
TORCH = {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1}


def write(folder: Path, backend: str, engine: dict[str, Any]) -> str:
    """teacher, other, a cache of other; routed: both teachers; mixed: both, the cache and a third resident one."""
    made = tiny_values(folder)
    write_data(folder / "data")
    for split in ("train", "test"):
        file = folder / "data" / f"{split}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        rows = rows[:5] if split == "test" else rows  # two batches of two ranks, one of them with one example
        named = [json.dumps({**row, "teacher": ("other", "teacher")[i % 3 == 0]}) for i, row in enumerate(rows)]
        file.write_text("\n".join(named) + "\n")
    teacher, student = made["stages"]["teacher"], made["stages"]["student"]
    still = {"dropout": 0.0}  # the two engines draw other numbers
    teacher["student"] |= still
    student = {**student, "student": {**student["student"], **still}, "steps": 4, "save_every": 0}
    own = [{"model": f"stage:{name}", "backend": backend} for name in ("teacher", "other")]
    cached = {"name": "cached", "model": "stage:cache/other", "backend": "cached"}
    made["stages"] = {
        "teacher": teacher,
        "other": {**teacher, "student": {**teacher["student"], "width": 12, "tie_embeddings": False}, "seed": 7},
        "cache": {"kind": "cache", "teachers": ["stage:other"], "cache": EXACT, "batch": {"sequences": 4}},
        "routed": {**student, "teachers": own, "weighting": "route"},
        "mixed": {**student, "teachers": [*own, cached, {"name": "third", "model": "stage:teacher"}]},
    }
    made["evaluate"] = {"ensembles": ["routed"], "resamples": 50, "batch": {"sequences": 3}}
    made["engine"] = engine
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False))
    return str(file)


def _run(file: str) -> dict[str, Any]:
    mtkd.running.run.write_report = lambda folder: folder / "report.html"  # type: ignore[attr-defined]
    results: dict[str, Any] = mtkd.running.run.run(load_config(Path(file))).results["models"]
    return results


def exported(folder: Path, stage: str) -> dict[str, Any]:
    (file,) = (folder / "runs" / NAME / "stages").glob(f"*-{stage}/export/model.safetensors")
    return load_file(file)


@pytest.mark.slow
def test_routed_and_mixed_runs_are_those_of_one_process(tmp_path: Path) -> None:
    """F14: five examples to score on two ranks, by sharded teachers whose ranks' examples name different ones."""
    alone, ranks = tmp_path / "alone", tmp_path / "ranks"
    for folder in (alone, ranks):
        folder.mkdir()
    (wanted,) = run_distributed(_run, 1, write(alone, "resident", TORCH), timeout=1200)
    found = run_distributed(_run, 2, write(ranks, "sharded", ENGINE), timeout=1200)
    assert found[0] == found[1]
    assert wanted.keys() == found[0].keys() >= {"routed", "mixed", "ensemble:routed"}
    for model, facts in wanted.items():
        for metric, value in facts["overall"].items():
            assert found[0][model]["overall"][metric] == pytest.approx(value, rel=1e-4), (model, metric)
    for stage in ("routed", "mixed"):
        ours, theirs = exported(ranks, stage), exported(alone, stage)
        for name, value in theirs.items():
            assert float((ours[name] - value).abs().max()) < 2e-4, (stage, name)
