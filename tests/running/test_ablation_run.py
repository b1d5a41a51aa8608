"""A whole run with `evaluate.ablate`: a teacher that is always wrong is shown to be one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from cache_runs import largest_difference

import mtkd
from mtkd.evaluate.report import summary, terminal_tables, write_report
from mtkd.running.run import run

BERT = {"architecture": "bert", "layers": 1, "width": 32, "heads": 2}
WORDS = {"red": "apple cherry tomato", "green": "grass lime leaf", "blue": "sky sea ink"}
NEXT = {"red": "green", "green": "blue", "blue": "red"}
"""What the wrong teacher learned: the class after the right one."""


def write_rows(folder: Path) -> None:
    draw = random.Random(0)
    for split, count in (("train", 96), ("test", 60)):
        rows = []
        for i in range(count):
            color = list(WORDS)[i % 3]
            text = " ".join(draw.choices(WORDS[color].split(), k=4))
            rows.append(json.dumps({"text": text, "right": color, "wrong": NEXT[color]}))
        (folder / f"{split}.jsonl").write_text("\n".join(rows) + "\n")


def config(folder: Path, **evaluate: Any) -> mtkd.RunConfig:
    write_rows(folder)
    files = {"source": "files", "files": {"train": "train.jsonl", "test": "test.jsonl"}, "task": "classify"}
    training = {"steps": 80, "batch": {"sequences": 16}, "optimizer": {"lr": 0.005}, "student": BERT}
    distill = {**training, "kind": "distill", "data": "right", "method": {"name": "kd", "options": {"hard": 0.0}}}
    teachers = ["stage:right", "stage:wrong"]
    values = {
        "name": "run",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "right", "vocab_size": 300},
        "data": {
            name: {**files, "label": name, "labels": list(WORDS), "max_length": 16} for name in ("right", "wrong")
        },
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "stages": {
            "right": {**training, "kind": "finetune", "data": "right"},
            "wrong": {**training, "kind": "finetune", "data": "wrong"},
            "live": {**distill, "teachers": ["stage:right"]},
            "student": {**distill, "teachers": teachers},
        },
        "evaluate": {"data": "right", "resamples": 400, "ablate": "teachers", **evaluate},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return mtkd.load_config(file)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    return run(config(folder)).folder


def test_the_wrong_teacher_is_worth_less_than_nothing(finished: Path) -> None:
    """The report's numbers against results.json: accuracy of the student minus that of the one without the teacher."""
    worth = {w["teacher"]: w for w in summary(finished)["worth"]}
    scores = {
        n: m["overall"]["accuracy"] for n, m in json.loads((finished / "results.json").read_text())["models"].items()
    }
    for name in ("right", "wrong"):
        assert worth[name]["worth"] == pytest.approx(scores["student"] - scores[f"student-without-{name}"])
        assert worth[name]["seconds"] > 0
    assert scores["student-without-wrong"] > 0.9
    assert worth["wrong"]["worth"] < -0.1
    assert worth["wrong"]["word"] == "worse"
    assert worth["wrong"]["high"] < 0
    assert worth["wrong"]["p"] < 0.05
    assert worth["right"]["word"] == "better"


def test_the_student_of_the_cache_is_that_of_the_live_teacher(finished: Path) -> None:
    assert largest_difference(finished, "student-without-wrong", "live") < 1e-4


def test_the_report_says_it_in_words(finished: Path) -> None:
    page = write_report(finished).read_text()
    assert "What each teacher was worth" in page
    assert "wrong: the student is better without it" in page
    assert "right: it helped" in page
    titles = [str(table.title) for table in terminal_tables(finished)]
    assert "What each teacher was worth" in titles


def test_a_finished_run_has_nothing_left_to_do(finished: Path) -> None:
    """Law: the stages of the ablation are stages: with their DONE they are skipped."""
    done = {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/DONE")}
    assert len(done) == 7
    run(config(finished.parent.parent))
    assert {path: path.stat().st_mtime_ns for path in finished.glob("stages/*/DONE")} == done


def test_the_plan_shows_the_stages_and_where_their_teachers_come_from(tmp_path: Path) -> None:
    found = mtkd.plan(config(tmp_path))
    names = [stage.name for stage in found.stages]
    assert names[3:] == ["student", "student-teachers", "student-without-right", "student-without-wrong"]
    assert any(
        "2 more students like student, from the cache of stage student-teachers" in note for note in found.precision
    )
    live = mtkd.plan(config(tmp_path, ablate={"cache": False}))
    assert any("2 more students like student, with live teachers" in note for note in live.precision)


def test_what_changes_no_score_computes_no_result_again(finished: Path) -> None:
    """Law: results.json stays, byte by byte, where the ablation is written as a block and less is said at a start."""
    before = (finished / "results.json").read_bytes()
    run(config(finished.parents[1], ablate={"stage": "student"}, agreement=False))
    assert (finished / "results.json").read_bytes() == before
