"""Chains beside other things: compressed students, stages of another task, overrides that undo a choice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_run import write_yaml

from mtkd.config import RunConfig
from mtkd.config.read import load_config
from mtkd.errors import UserError

SMALL = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2}


def chain_run(folder: Path, **changes: Any) -> RunConfig:
    chain = {
        "mode": "takd",
        "teachers": ["stage:teacher"],
        "student": SMALL,
        "rungs": [{"layers": 2, "width": 32, "heads": 4}],
        "steps": 2,
        **changes.pop("chain", {}),
    }
    stages = {"teacher": {"student": {**SMALL, "layers": 3}}, "student": None, **changes.pop("stages", {})}
    evaluate = {"ensembles": [], "comparisons": [], **changes.pop("evaluate", {})}
    return load_config(write_yaml(folder, stages=stages, chain=chain, evaluate=evaluate, **changes))


def test_assistants_keep_the_whole_vocabulary(tmp_path: Path) -> None:
    student = {**SMALL, "vocabulary": {"keep": 0.9, "counts": "text"}}
    stages = chain_run(tmp_path, chain={"student": student}).stages
    assert stages["student"].trained["student"].vocabulary is not None
    assert stages["direct"].trained["student"].vocabulary is not None
    assert stages["assistant-1"].trained["student"].vocabulary is None  # it is a teacher, too


def test_a_chain_of_another_task_asks_for_no_comparison(tmp_path: Path) -> None:
    classes = {"source": "files", "path": "data", "files": {"train": "train.jsonl", "test": "test.jsonl"}}
    classes |= {"task": "classify", "label": "text", "labels": ["a", "b"], "max_length": 64}
    final = {"kind": "finetune", "student": "stage:student", "data": "classes", "steps": 1}
    stages = {"teacher": {"data": "text", "student": {**SMALL, "layers": 3}}, "final": final}
    config = chain_run(
        tmp_path, chain={"data": "text"}, stages=stages, data={"classes": classes}, evaluate={"data": "classes"}
    )
    assert config.evaluate.comparisons == ()
    same = chain_run(
        tmp_path, chain={"data": "text"}, stages=stages, data={"classes": classes}, evaluate={"data": "text"}
    )
    assert [(c.candidate, c.baseline) for c in same.evaluate.comparisons] == [("student", "direct")]


def test_an_override_may_undo_the_choice_of_a_step(tmp_path: Path) -> None:
    best = {"export": "best", "export_metric": "perplexity", "evaluate_every": 1}
    stages = chain_run(tmp_path, chain={**best, "overrides": {"student": {"export": "last"}}}).stages
    assert (stages["student"].export, stages["student"].export_metric) == ("last", "")
    assert (stages["assistant-1"].export, stages["assistant-1"].export_metric) == ("best", "perplexity")


def test_random_tokens_count_nothing(tmp_path: Path) -> None:
    """A vocabulary cannot be cut by how frequent made-up tokens are."""
    noise = {"source": "random-tokens", "documents": 4}
    student = {**SMALL, "vocabulary": {"keep": 0.9, "counts": "noise"}}
    with pytest.raises(UserError, match="no frequencies to count"):
        chain_run(
            tmp_path,
            chain={"student": student, "data": "text"},
            data={"noise": noise},
            stages={"teacher": {"data": "text"}},
            evaluate={"data": "text"},
        )
