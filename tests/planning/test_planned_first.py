"""A mistake in a late stage is told before the first one is trained; what only the data can tell is left to them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_run import write_yaml

import mtkd
from mtkd.errors import UserError

BERT = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}


@pytest.mark.parametrize(
    ("student", "evaluate", "text"),
    [
        ({"match": [{"feature": "hidden", "loss": "mse", "teacher_layer": 7}]}, {}, "no such layer"),
        ({"student": {"max_positions": 64}, "data": "short"}, {"data": "long"}, "longer than 'teacher' can read"),
    ],
)
def test_the_last_stage_is_checked_before_the_first_is_trained(
    tmp_path: Path, student: dict[str, object], evaluate: dict[str, object], text: str
) -> None:
    files = {split: f"{split}.jsonl" for split in ("train", "test")}
    data = {"long": {"source": "files", "path": "data", "files": files, "max_length": 32}}
    data["short"] = {**data["long"], "max_length": 16}
    file = write_yaml(
        tmp_path,
        data={"text": None, **data},
        tokenizer={"train_on": "short"},
        stages={"teacher": {"data": "short"}, "student": {"data": "short", **student}},
        evaluate={"data": "short", **evaluate},
    )
    with pytest.raises(UserError, match=text):
        mtkd.run(mtkd.load_config(file))
    assert not (tmp_path / "runs" / "tiny").exists()


@pytest.mark.parametrize("label", ["classes", "numbers"])
def test_labels_that_only_the_data_know_are_planned_and_run(tmp_path: Path, label: str) -> None:
    write_yaml(tmp_path)
    rows = [{"text": f"word {i}", "label": f"c{i % 3}" if label == "classes" else i / 7} for i in range(12)]
    (tmp_path / "data" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {
        "source": "files",
        "path": "data",
        "files": dict.fromkeys(("train", "test"), "rows.jsonl"),
        "task": "classify",
    }
    soft = {"feature": "logits", "loss": "mse"}
    hard = {"feature": "logits", "loss": "label_mse" if label == "numbers" else "ce", "target": "labels"}
    file = write_yaml(
        tmp_path,
        tokenizer={"train_on": "rows"},
        data={"text": None, "rows": {**data, "max_length": 16}},
        stages={
            "teacher": {"student": None, "steps": 1},
            "student": {"student": None, "method": None, "match": [soft, hard], "steps": 1},
        },
        evaluate={"ensembles": [], "comparisons": []},
    )
    config = mtkd.load_config(file, [f"stages.{n}.student={json.dumps(BERT)}" for n in ("teacher", "student")])
    result = mtkd.run(config)
    exported = json.loads((result.export("student") / "config.json").read_text())
    assert len(exported.get("id2label", {"LABEL_0": 0, "LABEL_1": 1})) == (3 if label == "classes" else 1)
    again = mtkd.load_config(file, [f"stages.teacher.student={result.export('teacher')}", "name=again",
                                    f"stages.student.student={json.dumps(BERT)}",
                                    f"tokenizer={{path: {result.export('teacher')}}}"])  # fmt: skip
    assert mtkd.plan(again).stages[0].models[0].architecture == "bert"
