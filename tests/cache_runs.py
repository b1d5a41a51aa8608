"""Tiny runs with caches: two teachers, a stage that caches both, a student that reads the caches, and one with the
teachers themselves.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file
from tiny_run import tiny_values, write_data

from mtkd.config import RunConfig
from mtkd.config.read import load_config

EXACT = {"k": 300, "bits": 12, "shard_examples": 10}
"""Every id of the tiny tokenizer, as precisely as caches are: 48 examples make five files."""

TEACHERS = ("teacher", "other")
CACHED = [{"name": name, "model": f"stage:cache/{name}", "backend": "cached"} for name in TEACHERS]
LIVE = [{"name": name, "model": f"stage:{name}"} for name in TEACHERS]


def values(folder: Path, *, cache: dict[str, Any], student: dict[str, Any], **top: Any) -> dict[str, Any]:
    """A run of token models: teacher, other, cache, student (cached), live. `student` changes both students."""
    made = {**tiny_values(folder), **top}
    teacher, learner = made["stages"]["teacher"], made["stages"]["student"]
    learner = {**learner, "steps": 8, "save_every": 0, **student}
    learner.pop("teachers")
    made["stages"] = {
        "teacher": teacher,
        "other": {**teacher, "student": {**teacher["student"], "width": 12}, "seed": 7},
        "cache": {"kind": "cache", "teachers": LIVE, "cache": cache, "batch": {"sequences": 4}},
        "student": {**learner, "teachers": CACHED},
        "live": {**learner, "teachers": LIVE},
    }
    made["evaluate"] = {"ensembles": ["cache"], "resamples": 100} | top.get("evaluate", {})
    return made


def class_values(folder: Path, *, cache: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """The same of classifiers with three classes."""
    made = values(folder, cache=cache, student=student)
    made["data"]["text"] |= {"task": "classify", "labels": ["a", "b", "c"]}
    for stage in made["stages"].values():
        for model in filter(None, [stage.get("student")]):
            model["architecture"] = "bert"
    return made


def write(folder: Path, made: dict[str, Any]) -> Path:
    """The run's YAML file, with data (every text has a label too)."""
    if not (folder / "data").exists():
        write_data(folder / "data")
        chance = random.Random(1)
        for file in (folder / "data").iterdir():
            rows = [json.loads(line) | {"label": chance.choice("abc")} for line in file.read_text().splitlines()]
            for row in rows:
                row["text"] += {"a": " far", "b": " apart", "c": " then"}[row["label"]] * 3
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(made, sort_keys=False))
    return file


def config(folder: Path, made: dict[str, Any]) -> RunConfig:
    """The configuration, read and checked."""
    return load_config(write(folder, made))


def weights(run: Path, stage: str) -> dict[str, Any]:
    """The tensors of an exported model."""
    (export,) = (run / "stages").glob(f"*-{stage}/export")
    return load_file(export / "model.safetensors")


def largest_difference(run: Path, one: str, other: str) -> float:
    """Between the parameters of two stages' models."""
    ours, theirs = weights(run, one), weights(run, other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def cache_bytes(run: Path, teacher: str = "teacher") -> dict[str, bytes]:
    """Every file of a cache."""
    (folder,) = (run / "stages").glob(f"*-cache/export/{teacher}")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
