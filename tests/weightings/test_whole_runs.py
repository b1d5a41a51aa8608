"""Weightings with a state of their own in whole runs of the command, stopped and resumed; and what a plan refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
from tiny_run import NAME, tiny_config, write_yaml

from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.seal import check_seal
from mtkd.errors import UserError
from mtkd.planning.checks import check

CLOCK = ("time", "seconds")


def student(weighting: Any, **more: Any) -> dict[str, Any]:
    """A student of both teachers, as the changes of a tiny run."""
    shape = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.1}
    return {
        "kind": "distill",
        "student": shape,
        "teachers": ["stage:teacher", "stage:other"],
        "method": "kd",
        "weighting": weighting,
        "steps": 8,
        "batch": {"sequences": 8, "accumulate": 2},
        "optimizer": {"lr": 1e-2},
        "save_every": 3,
        **more,
    }


def two_students(folder: Path) -> Path:
    other = {
        "kind": "finetune",
        "student": {"architecture": "gpt2", "layers": 1, "width": 16, "heads": 2},
        "steps": 3,
        "batch": {"sequences": 8},
        "optimizer": {"lr": 1e-1},
    }
    gated = {"name": "learned", "options": {"gate": "pooled", "anchor_share": 0.5, "lr": 0.5}}
    stages = {
        "student": None,
        "other": other,
        "learned": student(gated),
        "reinforced": student({"name": "rl_kd", "options": {"lr": 0.5}}),
        "routed": student("route", steps=None, epochs=1, save_every=0),
    }
    evaluate = {"ensembles": None, "comparisons": [], "resamples": 10}
    file = write_yaml(folder, stages=stages, evaluate=evaluate)
    train = folder / "data" / "train.jsonl"
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    named = [json.dumps({**row, "teacher": ("other", "teacher")[i % 4 == 0]}) for i, row in enumerate(rows)]
    train.write_text("\n".join(named) + "\n")
    return file


def told(folder: Path) -> list[dict[str, Any]]:
    """Every logged number but the clock's."""
    lines = {(x["stage"], x["step"], "loss" in x): x for x in read_jsonl(folder / "runs" / NAME / "metrics.jsonl")}
    return [{k: v for k, v in line.items() if k not in CLOCK} for _, line in sorted(lines.items())]


def digests(folder: Path) -> dict[str, str]:
    """sha256 of the exported weights of every stage."""
    stages = sorted((folder / "runs" / NAME / "stages").iterdir())
    return {stage.name: json.loads((stage / "DONE").read_text())["fingerprint"] for stage in stages} | {
        f"{stage.name} weights": str((stage / "export" / "model.safetensors").read_bytes()) for stage in stages
    }


@pytest.mark.slow
def test_learned_and_reinforced_runs_resume_bit_equal(tmp_path: Path) -> None:
    """Runs that are stopped and resumed end with the same bits."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    code, output = processes.run(whole, "run", str(two_students(whole)))
    assert code == 0, output
    command = ("run", str(two_students(stopped)))
    for _ in range(3):  # in the fourth step of each student
        prepare = partial(processes.watch, str(stopped / "ids.jsonl"), 4)
        code, output = processes.run(stopped, *command, prepare=prepare)
        assert (code, "stopped and saved at step 4" in output) == (75, True), output
        command = ("resume", str(stopped / "runs" / NAME))
    code, output = processes.run(stopped, *command)
    assert (code, "resumed at step 4" in output) == (0, True), output
    assert told(stopped) == told(whole)
    assert digests(stopped) == digests(whole)
    last = [line for line in told(whole) if line["step"] == 8 and "penalty" in line]
    assert [line["stage"] for line in last] == ["learned", "reinforced"]
    assert all(abs(line["weight/other"] - 0.5) > 1e-3 for line in last), last
    (routed,) = [line for line in told(whole) if line["stage"] == "routed" and line["step"] == 6 and "loss" in line]
    assert 0.6 < routed["weight/other"] < 0.9  # three rows of four name it; two steps of eight are logged together
    for name in ("03-learned", "04-reinforced"):
        checkpoint = whole / "runs" / NAME / "stages" / name / "checkpoints" / "step-000008"
        assert check_seal(checkpoint)["step"] == 8


@pytest.mark.parametrize(
    ("weighting", "changes", "message"),
    [
        ("route", {"per": "token"}, "one weight per example, none per token"),
        ("rl_kd", {"per": "token"}, "one weight per example, none per token"),
        ({"name": "learned", "options": {"gate": "pooled"}}, {"per": "token"}, "one weight per example"),
        ({"name": "learned", "options": {"gate": "deep"}}, {}, "gate must be one of none, pooled; found deep"),
        ({"name": "learned", "options": {"anchor_share": 0.0}}, {}, "without anchors"),
        ({"name": "ae_kd", "options": {"c": 0.0}}, {}, "c must be above 0"),
        ({"name": "drop", "options": {"count": -1}}, {}, "must not be negative"),
        ({"name": "uncertainty", "options": {"mode": "medium"}}, {}, "hard, soft; found medium"),
        ({"name": "rl_kd", "options": {"decay": 1.0}}, {}, "decay"),
        ({"name": "rl_kd", "options": {"credit": "all"}}, {}, "credit must be one of example, batch; found all"),
        ({"name": "margin", "options": {"tau": -1.0}}, {}, "tau must be positive"),
        (
            "mgda",
            {"method": None, "match": [{"feature": "hidden", "loss": "mse"}]},
            "compares the teachers' gradients with respect to the student's logits",
        ),
    ],
)
def test_a_plan_refuses_what_means_nothing(
    tmp_path: Path, weighting: Any, changes: dict[str, Any], message: str
) -> None:
    """Options and stages that a weighting cannot serve are refused by the plan."""
    with pytest.raises(UserError, match=message):
        check(tiny_config(tmp_path, stages={"student": {"weighting": weighting, **changes}}))
