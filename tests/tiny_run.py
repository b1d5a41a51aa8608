"""A whole run small enough for tests: two stages, local files, a tokenizer trained on them; made in code, no downloads.

A fine-tuned teacher, then a student distilled from it. Both have dropout, so that a wrong random state shows; an epoch
is six optimizer steps, and a checkpoint is due every third one: in the middle of an epoch and at its end.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml

from mtkd.config import RunConfig
from mtkd.config.read import load_config

TEACHER_STEPS, STUDENT_STEPS, SAVE_EVERY, EPOCH_STEPS = 3, 8, 3, 6
NAME = "tiny"
_WORDS = (
    *("the", "teacher", "shows", "a", "student", "how", "one", "word", "follows", "another", "and", "then"),
    *("some", "loss", "weight", "is", "small", "while", "many", "features", "remain", "far", "apart"),
)


@contextmanager
def drawn_reports() -> Iterator[None]:
    """Within it runs in this process draw their report, which takes longer than they do; see the fixture `reports`."""
    from mtkd.evaluate.report import write_report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtkd.running.run.write_report", write_report)
        yield


def write_data(folder: Path, seed: int = 0) -> None:
    """train (48 documents), validation (8) and test (12) as JSON lines; every document is one example."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 48), ("validation", 8), ("test", 12)):
        texts = [" ".join(chance.choices(_WORDS, k=chance.randint(3, 10))) for _ in range(count)]
        lines = [json.dumps({"text": text}) for text in texts]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def tiny_values(folder: Path) -> dict[str, Any]:
    """The run as YAML values: output in ``folder/runs``, data below ``folder/data``."""
    return {
        "name": NAME,
        "output": str(folder / "runs"),
        "log_every": 2,
        "tokenizer": {"train_on": "text", "vocab_size": 300},
        "data": {
            "text": {
                "source": "files",
                "path": "data",
                "files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
                "max_length": 64,
            }
        },
        "engine": {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {
            "teacher": {
                "kind": "finetune",
                "student": {"architecture": "gpt2", "layers": 1, "width": 16, "heads": 2, "dropout": 0.1},
                "steps": TEACHER_STEPS,
                "batch": {"sequences": 8},
                "optimizer": {"lr": 1e-2},
            },
            "student": {
                "kind": "distill",
                "student": {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.1},
                "teachers": ["stage:teacher"],
                "method": "kd",
                "steps": STUDENT_STEPS,
                "batch": {"sequences": 8},
                "optimizer": {"lr": 1e-2},
                "save_every": SAVE_EVERY,
                "keep": 3,
            },
        },
        "evaluate": {
            "ensembles": ["student"],
            "comparisons": [{"candidate": "student", "baseline": "teacher"}],
            "resamples": 100,
        },
    }


def write_yaml(folder: Path, **changes: Any) -> Path:
    """Data and ``run.yaml`` in `folder`, with changes: ``stages={"teacher": None, "student": {"steps": 5}}``.

    Args:
        changes: merged into `tiny_values`; None removes a key.
    """
    if not (folder / "data").exists():
        write_data(folder / "data")
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(_merged(tiny_values(folder), changes), sort_keys=False))
    return file


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """The configuration of `write_yaml`, read and checked."""
    return load_config(write_yaml(folder, **changes))


def _merged(values: Any, changes: Any) -> Any:
    if not (isinstance(values, dict) and isinstance(changes, dict)):
        return changes
    merged = {**values, **{key: _merged(values.get(key), change) for key, change in changes.items()}}
    return {key: value for key, value in merged.items() if value is not None}


def undisturbed(folder: Path) -> Path:
    """Make a run in `folder` that nothing disturbs."""
    code, output = processes.run(
        folder, "run", str(write_yaml(folder)), prepare=partial(processes.watch, ids_file(folder))
    )
    assert code == 0, output
    return folder


def with_teacher(whole: Path, folder: Path, **changes: Any) -> Path:
    """The YAML file of a run in `folder` whose teacher is already made, as in the finished run `whole`."""
    shutil.copytree(whole / "data", folder / "data")
    run = folder / "runs" / NAME
    shutil.copytree(whole / "runs" / NAME, run, ignore=shutil.ignore_patterns("02-student", "scores*", "results.json"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"teacher"' in line[:22]))
    return write_yaml(folder, **changes)


def student_of_folder(folder: Path, **student: Any) -> str:
    """The YAML file of a run of the student alone, whose teacher is the local folder ``model/teacher``."""
    stages = {"teacher": None, "student": {"teachers": ["model/teacher"], **student}}
    return str(write_yaml(folder, stages=stages, evaluate={"comparisons": []}))


def ids_file(folder: Path) -> str:
    """Where `processes.watch` writes for the run in `folder`."""
    return str(folder / "ids.jsonl")
