"""A whole run whose models answer held-out prompts: scores, comparisons, samples, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rollout_runs import write_run

import mtkd
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.errors import DataError, UserError
from mtkd.evaluate.report import write_report
from mtkd.evaluate.report.read import read_run
from mtkd.evaluate.report.terminal import terminal_tables

ANSWERS: dict[str, Any] = {"max_new_tokens": 6, "extract": "whole", "metrics": ["exact_match"]}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with answers."""
    folder = tmp_path_factory.mktemp("answers")
    mtkd.run(load_config(_file(folder)))
    return folder


def _file(folder: Path, **answers: Any) -> Path:
    file = write_run(folder, None, {"steps": 1})
    values = yaml.safe_load(file.read_text())
    values["evaluate"] |= {"answers": {**ANSWERS, **answers}}
    values["evaluate"]["comparisons"] = [{"candidate": "student", "baseline": "teacher"}]
    values["data"]["text"]["domain"] = "kind"
    for split in ("train", "validation", "test"):
        lines = [json.loads(line) for line in (folder / f"data/{split}.jsonl").read_text().splitlines()]
        marked = [json.dumps({**line, "kind": "short" if len(line["text"]) < 4 else "long"}) for line in lines]
        (folder / f"data/{split}.jsonl").write_text("\n".join(marked) + "\n")
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "runs/tiny/results.json").read_text())


def test_the_results_are_the_means_of_the_texts_overall_and_per_domain(ran: Path) -> None:
    """results.json has the mean of every record, over all and in each domain, and every model's row."""
    found = _results(ran)["answers"]
    assert set(found["models"]) == {"teacher", "student"}
    for number, name in enumerate(found["models"], 1):
        records = read_jsonl(ran / f"runs/tiny/stages/0{number}-{name}/answers.jsonl")
        assert len(records) == 6
        for part, shown in {"": found["models"][name]["overall"], **found["models"][name]["domains"]}.items():
            mine = [record for record in records if part in ("", record["domain"])]
            assert shown["documents"] == len(mine) > 0
            for metric in ("exact_match", "length", "cut"):
                assert shown[metric] == pytest.approx(sum(record[metric] for record in mine) / len(mine))
    assert set(found["models"]["student"]["domains"]) == {"short", "long"}


def test_comparisons_of_texts_and_scores_are_one_family(ran: Path) -> None:
    """Exact match goes through McNemar's test; Holm corrects it with the scores' own."""
    results = _results(ran)
    written = results["answers"]["comparisons"]
    assert [(row["metric"], row["test"], row["domain"]) for row in written] == [
        ("exact_match", "mcnemar", domain) for domain in ("overall", "long", "short")
    ]
    every = [*results["comparisons"], *written]
    least = min(every, key=lambda row: row["p"])
    assert least["p_holm"] == pytest.approx(min(1.0, len(every) * least["p"]))


def test_report_and_terminal_show_scores_and_samples(ran: Path) -> None:
    """Page and terminal have the table; the page has four prompts, each with the data's and every model's answer."""
    page = write_report(ran / "runs/tiny").read_text()
    assert 'id="table-answers"' in page
    assert "table-sample-4" in page
    assert "table-sample-5" not in page
    assert "Answers" in [table.title for table in terminal_tables(ran / "runs/tiny")]
    samples = read_run(ran / "runs/tiny").answers["samples"]
    assert [set(sample["answers"]) for sample in samples] == [{"teacher", "student"}] * 4
    assert all(sample["prompt"] == f"say {sample['reference']}: " for sample in samples)


def test_texts_are_kept_and_the_same_when_written_once_more(ran: Path, tmp_path: Path) -> None:
    """A second run writes nothing; without its files it writes the same, and a changed setting is written as asked."""
    folder = tmp_path / "copy"
    shutil.copytree(ran, folder)
    file = _moved(folder)
    texts = folder / "runs/tiny/stages/02-student/answers.jsonl"
    before, other = texts.read_bytes(), texts.parents[1] / "01-teacher/answers.jsonl"
    made = other.stat().st_mtime_ns
    texts.unlink()
    mtkd.run(load_config(file))
    assert texts.read_bytes() == before
    assert other.stat().st_mtime_ns == made
    mtkd.run(load_config(file, ["evaluate.answers.max_new_tokens=1"]))
    assert all(record["length"] == 1 for record in read_jsonl(texts))


def _moved(folder: Path) -> Path:
    file = folder / "run.yaml"
    values = yaml.safe_load(file.read_text())
    values["output"] = str(folder / "runs")
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def test_sampled_answers_depend_on_the_seed_alone(ran: Path, tmp_path: Path) -> None:
    """At a temperature two runs write the same, in batches of 32 as in batches of 2."""
    folder = tmp_path / "copy"
    shutil.copytree(ran, folder)
    file = _moved(folder)
    texts = folder / "runs/tiny/stages/02-student/answers.jsonl"
    greedy = [record["answer"] for record in read_jsonl(texts)]
    drawn = []
    for size in (32, 2):
        options = ["evaluate.answers.temperature=1", f"evaluate.batch.sequences={size}"]
        texts.unlink()
        mtkd.run(load_config(file, options))
        drawn.append([record["answer"] for record in read_jsonl(texts)])
    assert drawn[0] == drawn[1]
    assert drawn[0] != greedy


@pytest.mark.parametrize(
    ("answers", "data", "error", "says"),
    [
        ({"extract": "last_number"}, {}, DataError, "nothing is found in the data's answer"),
        ({"stop": ["no token"]}, {}, UserError, "not one token"),
        ({"split": "validation", "max_new_tokens": 25}, {}, UserError, "at most 24"),
        ({}, {"prompt": None}, UserError, "only prompts are answered"),
        ({"extract": {"path": "no.py", "name": "f"}}, {}, UserError, "no such Python file"),
    ],
    ids=["no-number", "stop", "long", "no-prompts", "no-file"],
)
def test_what_cannot_be_answered_is_refused_before_training(
    tmp_path: Path, answers: dict[str, Any], data: dict[str, Any], error: type[UserError], says: str
) -> None:
    """No stage has begun when the error comes."""
    file = _file(tmp_path, **answers)
    values = yaml.safe_load(file.read_text())
    values["data"]["text"] = {k: v for k, v in {**values["data"]["text"], **data}.items() if v is not None}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(error, match=says):
        mtkd.run(load_config(file))
    assert not list(tmp_path.glob("runs/tiny/stages/*/*"))


def test_a_model_that_has_learned_the_answer_has_all_right(tmp_path: Path) -> None:
    """The answer is always "ab": a teacher that has learned it scores 1, ends by itself, and is not cut."""
    file = _file(tmp_path, max_new_tokens=8)
    for split in ("train", "validation", "test"):
        lines = (tmp_path / f"data/{split}.jsonl").read_text().splitlines()
        same = [json.dumps({**json.loads(line), "text": "ab"}) for line in lines]
        (tmp_path / f"data/{split}.jsonl").write_text("\n".join(same) + "\n")
    mtkd.run(load_config(file, ["stages.teacher.steps=60"]))
    overall = _results(tmp_path)["answers"]["models"]["teacher"]["overall"]
    assert (overall["exact_match"], overall["cut"]) == (1.0, 0.0)
    assert 2 <= overall["length"] <= 3
    records = read_jsonl(tmp_path / "runs/tiny/stages/01-teacher/answers.jsonl")
    assert {record["answer"] for record in records} == {"ab"}
