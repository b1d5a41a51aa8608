"""Tiny runs whose student writes its own answers: prompts of digits, a teacher that was fine-tuned on the answers."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

from tiny_run import NAME, write_yaml

from mtkd.config import RunConfig
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import ROLLOUT, read_jsonl


def write_prompts(folder: Path) -> None:
    """24 prompts to train on, 6 to validate and 6 to test with; the answer is the prompt's letters once more."""
    chance = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 24), ("validation", 6), ("test", 6)):
        words = ["".join(chance.choices("abcd", k=chance.randint(1, 6))) for _ in range(count)]
        lines = [json.dumps({"prompt": f"say {word}: ", "text": word}) for word in words]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def write_run(
    folder: Path, rollout: dict[str, Any] | None, student: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """The YAML file of a run of a fine-tuned teacher and a student with `rollout`.

    Args:
        student: further fields of the student's stage.
    """
    write_prompts(folder / "data")
    stage = {"steps": 6, "save_every": 2, "match": [{"feature": "logits", "loss": "reverse_kl"}], "method": None}
    if rollout is not None:
        stage["rollout"] = {"max_new_tokens": 6, **rollout}
    stages = {"student": {**stage, **(student or {})}, **changes.pop("stages", {})}
    data = {"text": {"prompt": "prompt", "max_length": 24}}
    evaluate = {"ensembles": None, "comparisons": None, "resamples": None, "agreement": False}
    return write_yaml(folder, data=data, stages=stages, log_every=1, evaluate=evaluate, **changes)


def rollout_config(folder: Path, rollout: dict[str, Any] | None, **changes: Any) -> RunConfig:
    """The configuration of `write_run`, read and checked."""
    return load_config(write_run(folder, rollout, **changes))


def student_again(whole: Path, folder: Path, rollout: dict[str, Any] | None, **changes: Any) -> RunConfig:
    """A run in `folder` whose teacher is that of the finished run `whole`, and whose student is still to be made."""
    run = folder / "runs" / NAME
    shutil.copytree(whole / "runs" / NAME, run, ignore=shutil.ignore_patterns("02-student", "scores*", "results.json"))
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in lines if '"teacher"' in line[:22]))
    return rollout_config(folder, rollout, **changes)


def made(folder: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    """The student's export, and every line of the log of its training without clock times."""
    run = folder / "runs" / NAME
    weights = {file.name: file.read_bytes() for file in (run / "stages/02-student/export").glob("*.safetensors")}
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if line["stage"] == "student"]
    assert weights
    return weights, [{name: value for name, value in line.items() if not is_clock(name)} for line in lines]


def is_clock(name: str) -> bool:
    return name in ("time", "seconds") or (name.startswith(ROLLOUT) and "second" in name)
