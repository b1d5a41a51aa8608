"""Combinations that only fail when they meet: refused by the plan, before anything is read or trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import mtkd
from mtkd.config import RunConfig
from mtkd.config.read import config_digest
from mtkd.errors import UserError
from mtkd.planning.stages import stage_values

BERT = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
KD = {"kind": "distill", "method": {"name": "kd", "options": {"hard": 0.0}}, "student": BERT}


def run_of(folder: Path, stages: dict[str, Any], **changes: Any) -> RunConfig:
    """Masked tokens, two and three classes, and random tokens, over the same rows."""
    rows = [{"text": f"word {i} and more", "pair": "b", "two": "ab"[i % 2], "three": "xyz"[i % 3]} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"source": "files", "files": dict.fromkeys(("train", "test"), "rows.jsonl"), "max_length": 16}
    classes = {**files, "task": "classify"}
    values: dict[str, Any] = {
        "name": "run",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "tokens", "vocab_size": 300},
        "data": {
            "tokens": {**files, "task": "masked-lm"},
            "pairs": {**files, "task": "masked-lm", "next_sentence": True},
            "two": {**classes, "label": "two", "labels": ["a", "b"]},
            "three": {**classes, "label": "three", "labels": ["x", "y", "z"]},
            "noise": {
                "source": "random-tokens",
                "documents": 4,
                "max_length": 16,
                "task": "classify",
                "labels": ["a", "b"],
            },
        },
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {name: {"steps": 1, **stage} for name, stage in stages.items()},
        "evaluate": {"data": next(iter(stages.values()))["data"], "resamples": 20},
        **changes,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return mtkd.load_config(file)


TUNE = {"kind": "finetune", "student": BERT}


@pytest.mark.parametrize("accumulate", [2, 8])
def test_examples_are_not_compared_in_micro_batches_of_one(tmp_path: Path, accumulate: int) -> None:
    """DIST's term within a class: four in each of 2 micro-batches are enough, one in each of 8 is not."""
    stage = {**KD, "method": "dist", "data": "three", "teachers": ["stage:m"]}
    stage["batch"] = {"sequences": 8, "accumulate": accumulate}
    config = run_of(tmp_path, {"m": {**TUNE, "data": "three"}, "s": stage})
    if accumulate == 2:
        mtkd.plan(config)
        return
    with pytest.raises(UserError, match=r"stages.s.batch: .*fewer than two"):
        mtkd.plan(config)


@pytest.mark.parametrize(
    ("stages", "changes", "text"),
    [
        (
            {"m": {**TUNE, "data": "tokens"}, "s": {**KD, "data": "two", "teachers": ["stage:m"]}},
            {"evaluate": {"data": "two"}},
            "made its model for another task",
        ),
        (
            {"m": {**TUNE, "data": "tokens"}, "s": {**KD, "data": "pairs", "teachers": ["stage:m"]}},
            {},
            "made its model for another task",
        ),
        (
            {"a": {**TUNE, "data": "two"}, "b": {"kind": "finetune", "student": "stage:a", "data": "three"}},
            {},
            "a classifier of other classes",
        ),
        ({"a": {**TUNE, "data": "two"}}, {"evaluate": {"data": "two", "split": "validation"}}, "no validation split"),
        ({"a": {**TUNE, "data": "two"}}, {"evaluate": {"data": "noise"}}, "no test split"),
        (
            {"a": {**TUNE, "data": "two"}, "s": {**KD, "data": "noise", "teachers": ["stage:a"], "weighting": "route"}},
            {},
            "from a column",
        ),
        (
            {"a": {**TUNE, "data": "two"}, "s": {**KD, "data": "two", "teachers": ["stage:a"], "weighting": "route"}},
            {},
            "from a column",
        ),
        (
            {
                "a": {**TUNE, "data": "two"},
                "s": {**KD, "data": "noise", "teachers": ["stage:a"], "export": "best", "evaluate_every": 1},
            },
            {},
            "no validation split",
        ),
        (
            {"a": {**TUNE, "data": "two"}, "s": {**KD, "data": "two", "teachers": ["stage:a"], "per": "token"}},
            {},
            "one target per example",
        ),
        ({"a": {**TUNE, "data": "two", "student": {**BERT, "revision": "x"}}}, {}, "revision goes with path"),
        (
            {
                "a": {**TUNE, "data": "two"},
                "s": {**TUNE, "data": "two", "student": {"path": "stage:a", "tie_embeddings": True}},
            },
            {},
            "drop tie_embeddings",
        ),
    ],
)
def test_it_is_refused(tmp_path: Path, stages: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        mtkd.plan(run_of(tmp_path, stages, **changes))


def test_stages_of_other_classes_are_not_scored_by_default(tmp_path: Path) -> None:
    config = run_of(tmp_path, {"a": {**TUNE, "data": "two"}, "b": {**TUNE, "data": "three"}})
    assert list(mtkd.run(config).results["models"]) == ["a"]


def test_hidden_states_of_another_task_may_teach(tmp_path: Path) -> None:
    hidden = [{"feature": "hidden", "loss": "mse"}]
    student = {"kind": "distill", "student": BERT, "data": "two", "teachers": ["stage:m"], "match": hidden}
    mtkd.plan(run_of(tmp_path, {"m": {**TUNE, "data": "tokens"}, "s": student}, evaluate={"data": "two"}))


def test_weightings_without_labels_work_on_made_up_classes(tmp_path: Path) -> None:
    student = {**KD, "data": "noise", "teachers": ["stage:a", "stage:b"], "weighting": "entropy"}
    stages = {
        "a": {**TUNE, "data": "two"},
        "b": {**TUNE, "data": "two", "steps": 20, "optimizer": {"lr": 1e-2}},
        "s": student,
    }
    result = mtkd.run(run_of(tmp_path, stages))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    weights = [(line["weight/a"], line["weight/b"]) for line in lines if "weight/a" in line]
    assert weights
    assert all(a != b for a, b in weights)


def test_the_order_of_members_is_part_of_what_is_made(tmp_path: Path) -> None:
    def config(order: str) -> RunConfig:
        members = dict.fromkeys(order, BERT)
        return run_of(tmp_path, {"co": {"kind": "cofinetune", "members": members, "data": "two"}})

    one, other = config("ab"), config("ba")
    assert stage_values(one.stages["co"]) != stage_values(other.stages["co"])
    assert config_digest(one) != config_digest(other)


def test_a_changed_plugin_is_another_stage(tmp_path: Path) -> None:
    code = """
import mtkd
@mtkd.weighting("first_{n}")
class First(mtkd.Weighting):
    def forward(self, traits):
        return traits.full(1 / traits.num_teachers)
"""
    plugin = tmp_path / "plugin_of_checks.py"
    plugin.write_text(code.replace("{n}", "of_checks"))
    student = {**KD, "data": "two", "teachers": ["stage:a"], "weighting": "first_of_checks"}
    stages = {"a": {**TUNE, "data": "two"}, "s": student}
    mtkd.run(run_of(tmp_path, stages, plugins=[plugin.name]))
    plugin.write_text(plugin.read_text() + "# another\n")
    with pytest.raises(UserError, match=r"plugins.*plugin_of_checks"):
        mtkd.run(run_of(tmp_path, stages, plugins=[plugin.name]))
