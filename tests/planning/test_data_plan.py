"""The plan meets the data: classes, labels that are not there, and the first examples, before anything is trained."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from data.data_examples import sentences
from rich.console import Console
from tiny import NUM_IDS, classifier, make_objective
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import mtkd
from mtkd.config.match import Match
from mtkd.data.batch import position_counts
from mtkd.data.load import load_data
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import EXIT_DATA, DataError, UserError
from mtkd.planning.data import DataReader
from mtkd.planning.dataview import data_tables

BERT = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
SOFT = {"feature": "logits", "loss": "kl"}
TUNE = {"kind": "finetune", "student": BERT, "steps": 1, "batch": {"sequences": 4}}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(50), 300, closed=True)


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """Two teachers with names of classes in another order, and files of every state of labelling."""
    for name, classes in (("teacher", ("no", "yes")), ("other", ("yes", "no", "maybe"))):
        config = BertConfig(
            vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=64, id2label=dict(enumerate(classes)),
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    texts = sentences(12)
    rows = [{"text": text, "label": ("yes", "no")[i % 2]} for i, text in enumerate(texts)]
    write(tmp_path / "labelled.jsonl", rows)
    write(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    write(tmp_path / "null.jsonl", [{"text": text, "label": None} for text in texts])
    write(tmp_path / "partly.jsonl", [*rows[:5], *({"text": text, "label": ""} for text in texts[5:])])
    return tmp_path


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run_of(folder: Path, train: str, stages: dict[str, Any], **changes: Any) -> Path:
    """The YAML file of a run on `train`, tested on labelled texts."""
    data = {
        "source": "files",
        "files": {"train": train, "test": "labelled.jsonl"},
        "task": "classify",
        "max_length": 32,
    }
    data |= changes.pop("data", {})
    values = {
        "name": "run",
        "output": str(folder / "runs"),
        "tokenizer": {"path": "teacher"},
        "data": {"rows": data, **changes.pop("more", {})},
        "engine": {"kind": "torch", "device": "cpu", "threads": 1},
        "stages": stages,
        "evaluate": {"resamples": 100, **changes.pop("evaluate", {})},
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return file


def distil(*teachers: str | dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"kind": "distill", "student": BERT, "teachers": list(teachers) or ["teacher"], "match": [SOFT], "steps": 2,
            "batch": {"sequences": 4}, **changes}  # fmt: skip


def plan(file: Path) -> mtkd.Plan:
    return mtkd.plan(mtkd.load_config(file))


def test_the_plan_shows_classes_and_examples_as_the_run_has_them(
    folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = run_of(folder, "labelled.jsonl", {"m": TUNE}, data={"limit": {"train": 6}})
    config = mtkd.load_config(file)
    (shown,) = mtkd.plan(config).data
    assert (shown.classes, shown.labels, shown.pad_token) == (("no", "yes"), "2 classes", "<pad>")
    assert shown.rows == shown.labelled == {"train": 6, "test": 12}
    data = config.data["rows"]
    split = load_data("rows", data, DataReader(folder).raw(data), tokenizer).splits["train"]
    for i, example in enumerate(shown.examples):
        ids = split.collate([i]).input_ids[0].tolist()
        assert (example.text, example.tokens) == (tokenizer.decode(ids), len(ids))
        assert example.asked == ("no", "yes")[int(split.labels[i])]
    assert len(shown.examples) == 2
    assert json.loads(json.dumps(mtkd.plan(config).as_dict()))["data"][0]["classes"] == ["no", "yes"]


def test_texts_that_look_like_markup_are_shown_as_they_are(folder: Path) -> None:
    write(folder / "odd.jsonl", [{"text": "a [/b] [red]c\x1b[1m", "label": x} for x in ("[x]", "[/y]")])
    shown = plan(run_of(folder, "odd.jsonl", {"m": TUNE}, data={"files": {"train": "odd.jsonl", "test": "odd.jsonl"}}))
    console = Console(width=300, record=True, file=io.StringIO())
    for table in data_tables(shown.data):
        console.print(table)
    text = console.export_text()
    assert "[/y]" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("train", ["texts.jsonl", "null.jsonl"])
def test_texts_without_labels_have_the_classes_of_the_teachers(folder: Path, train: str) -> None:
    """In the order of the teacher's own outputs; the labels of the test split are read by these names."""
    made = plan(run_of(folder, train, {"student": distil()}))
    (shown,) = made.data
    assert shown.classes == ("no", "yes")
    assert shown.labelled == {"train": 0, "test": 12}
    assert shown.examples[0].asked == "no label"


def test_an_earlier_stage_brings_the_classes_of_its_data(folder: Path) -> None:
    known = {"source": "files", "files": dict.fromkeys(("train", "test"), "labelled.jsonl"), "task": "classify"}
    stages = {"tuned": {**TUNE, "data": "known"}, "student": distil("stage:tuned", data="rows")}
    file = run_of(folder, "texts.jsonl", stages, more={"known": {**known, "max_length": 32}}, evaluate={"data": "rows"})
    assert [data.classes for data in plan(file).data] == [("no", "yes")] * 2


def test_teachers_of_different_classes_name_none(folder: Path) -> None:
    with pytest.raises(UserError, match="teachers have different classes") as caught:
        plan(run_of(folder, "texts.jsonl", {"student": distil("teacher", "other")}))
    assert caught.value.where == "data.rows.labels"
    mapped = {"name": "other", "model": "other", "classes": ["yes", "no", None]}
    assert set(plan(run_of(folder, "texts.jsonl", {"student": distil("teacher", mapped)})).data[0].classes) == {
        "no",
        "yes",
    }


@pytest.mark.parametrize(
    ("stage", "found"),
    [
        (distil(method="kd", match=[]), "row logits:ce"),
        (distil(weighting="mt_bert"), "weighting 'mt_bert'"),
        (TUNE, "kind: finetune"),
    ],
)
def test_who_reads_labels_of_unlabelled_texts_is_refused(folder: Path, stage: dict[str, Any], found: str) -> None:
    file = run_of(folder, "texts.jsonl", {"stage": stage}, data={"labels": ["no", "yes"]})
    with pytest.raises(UserError, match="the train split of data 'rows' has no labels") as caught:
        plan(file)
    assert caught.value.where.startswith("stages.stage")
    assert found in str(caught.value.found)


def test_what_is_scored_or_chosen_by_has_labels(folder: Path) -> None:
    files = {"train": "labelled.jsonl", "validation": "texts.jsonl", "test": "null.jsonl"}
    with pytest.raises(UserError, match="no labels to score on") as caught:
        plan(run_of(folder, "", {"m": TUNE}, data={"files": files}))
    assert caught.value.where == "evaluate.split"
    chosen = {**TUNE, "early_stop": {"patience": 2}, "evaluate_every": 1}
    files["test"] = "labelled.jsonl"
    with pytest.raises(UserError, match="no labels to choose by"):
        plan(run_of(folder, "", {"m": chosen}, data={"files": files}))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"text": "x", "label": "perhaps"}], "no row of the train split has this label"),
        ([{"text": None, "label": "no"}, {"text": "x", "label": "yes"}], "no text in column 'text'"),
        ([], "no rows"),
        ([{"words": "x", "label": "yes"}], "no column 'text'"),
    ],
)
def test_a_broken_test_split_is_refused_at_plan(folder: Path, rows: list[dict[str, Any]], match: str) -> None:
    write(folder / "broken.jsonl", rows)
    file = run_of(folder, "", {"m": TUNE}, data={"files": {"train": "labelled.jsonl", "test": "broken.jsonl"}})
    with pytest.raises(DataError, match=match) as caught:
        plan(file)
    assert caught.value.exit_code == EXIT_DATA
    assert "broken.jsonl" in caught.value.where
    assert not (folder / "runs").exists()


def test_a_model_is_not_scored_on_other_classes(folder: Path) -> None:
    write(folder / "three.jsonl", [{"text": text, "label": "abc"[i % 3]} for i, text in enumerate(sentences(6))])
    files = {"train": "three.jsonl", "test": "three.jsonl"}
    other = {"source": "files", "files": files, "task": "classify", "max_length": 32}
    file = run_of(folder, "labelled.jsonl", {"m": {**TUNE, "data": "rows"}}, more={"three": other},
                  evaluate={"data": "three"})  # fmt: skip
    with pytest.raises(UserError, match="has other classes"):
        plan(file)


def test_a_label_row_is_the_mean_over_the_labelled_examples(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """5 of 12 rows have a label: loss and gradient are those of the 5 alone."""
    data = mtkd.load_config(run_of(folder, "partly.jsonl", {"m": TUNE})).data["rows"]
    split = load_data("rows", data, DataReader(folder).raw(data), tokenizer).splits["train"]
    found, row = [], Match(feature="logits", loss="ce", target="labels")
    for rows in (range(12), range(5)):
        batch = split.collate(rows)
        objective, _ = make_objective(classifier(8, 1, 0, num_labels=2), [], [row])
        batch.input_ids %= NUM_IDS
        counts = position_counts([batch])
        assert counts["targets"] == 5
        loss, _ = objective(batch, [], counts)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in objective.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("train", ["texts.jsonl", "partly.jsonl"])
def test_unlabelled_texts_are_distilled_and_finished_stages_are_known_again(folder: Path, train: str) -> None:
    hard = [] if train == "texts.jsonl" else [{"feature": "logits", "loss": "ce", "target": "labels"}]
    weighting = "uniform" if train == "texts.jsonl" else "mt_bert"
    file = run_of(folder, train, {"student": distil("teacher", match=[SOFT, *hard], weighting=weighting)})
    result = mtkd.run(mtkd.load_config(file))
    assert 0 <= result.results["models"]["student"]["overall"]["accuracy"] <= 1
    exported = json.loads((result.export("student") / "config.json").read_text())
    assert exported["id2label"] == {"0": "no", "1": "yes"}
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] == line["loss"] for line in lines if "loss" in line)
    again = mtkd.run(mtkd.load_config(file))
    assert again.stages == result.stages
