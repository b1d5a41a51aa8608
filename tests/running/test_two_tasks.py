"""One run of two tasks: pre-training distillation on pairs of segments, then fine-tuning distillation of classes.

The student of the second starts from the first, with another head and the same tokenizer; its teacher is fine-tuned.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import drawn_reports
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import mtkd
from mtkd.config import RunConfig
from mtkd.errors import UserError
from mtkd.models.load import quiet
from mtkd.running.run import RunResult

WORDS = {"good": "fine bright warm kind open", "bad": "cold dark sour rude shut"}
MODEL = {"architecture": "bert", "layers": 2, "width": 16, "heads": 2}


def write_data(folder: Path) -> None:
    chance = random.Random(0)
    for split, count in (("train", 40), ("test", 16)):
        lines = []
        for _ in range(count):
            label = chance.choice(sorted(WORDS))
            words = chance.choices([*WORDS[label].split(), "the", "day", "was"], k=chance.randint(8, 20))
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def values(folder: Path) -> dict[str, Any]:
    files = {"source": "files", "path": str(folder), "files": {s: f"{s}.jsonl" for s in ("train", "test")}}
    training = {"steps": 4, "batch": {"sequences": 8}, "optimizer": {"lr": 1e-2}}
    rows = [{"feature": "nsp_logits", "loss": "kl"}, {"feature": "nsp_logits", "loss": "ce", "target": "labels"}]
    return {
        "name": "two-tasks",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "text", "vocab_size": 300},
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "data": {
            "text": {**files, "task": "masked-lm", "next_sentence": True, "max_length": 32},
            "task": {**files, "task": "classify", "max_length": 32},
        },
        "stages": {
            "base": {"kind": "finetune", "data": "text", "student": {**MODEL, "layers": 4, "width": 24}, **training},
            "pretrain": {
                "kind": "distill",
                "data": "text",
                "student": MODEL,
                "teachers": ["stage:base"],
                "method": "tinybert",
                "match": rows,
                **training,
            },
            "teacher": {"kind": "finetune", "data": "task", "student": "stage:base", **training},
            "layers": {
                "kind": "distill",
                "data": "task",
                "student": "stage:pretrain",
                "teachers": ["stage:teacher"],
                "method": "tinybert",
                **training,
            },
            "student": {
                "kind": "distill",
                "data": "task",
                "student": "stage:layers",
                "teachers": ["stage:teacher"],
                "method": {"name": "tinybert", "options": {"step": "prediction"}},
                **training,
            },
        },
        "evaluate": {"data": "task", "comparisons": [{"candidate": "student", "baseline": "teacher"}], "resamples": 50},
    }


def config(folder: Path, **evaluate: Any) -> RunConfig:
    held = values(folder)
    return RunConfig.model_validate({**held, "evaluate": {**held["evaluate"], **evaluate}})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    folder = tmp_path_factory.mktemp("two-tasks")
    write_data(folder)
    with drawn_reports():
        return mtkd.run(config(folder))


def test_only_the_stages_of_the_evaluated_task_are_scored(made: RunResult) -> None:
    assert list(made.stages) == ["base", "pretrain", "teacher", "layers", "student"]
    assert list(made.results["models"]) == ["teacher", "student"]  # no row of `layers` teaches its head to predict
    assert made.results["comparisons"]
    assert made.report.is_file()


def metrics(made: RunResult, stage: str) -> dict[str, float]:
    lines = [json.loads(line) for line in (made.folder / "metrics.jsonl").read_text().splitlines()]
    return next(line for line in lines if line["stage"] == stage)


def test_each_stage_has_the_rows_of_its_step(made: RunResult) -> None:
    """As its metrics name them: labels, then layers with and without predictions, then soft targets."""
    layers = ["row/0:embedding:mse", "row/1:hidden:mse", "row/2:scores:attention_mse"]

    def rows(stage: str) -> list[str]:
        return sorted(key for key in metrics(made, stage) if key.startswith("row/"))

    assert rows("base") == ["row/0:logits:ce", "row/1:nsp_logits:ce"]
    assert rows("pretrain") == [*layers, "row/3:nsp_logits:kl", "row/4:nsp_logits:ce"]
    assert rows("layers") == layers
    assert rows("student") == ["row/0:logits:soft_ce"]
    assert 0.3 < metrics(made, "base")["row/1:nsp_logits:ce"] < 1.2  # about ln 2 before it has learned anything


def test_the_second_task_starts_from_the_first(made: RunResult) -> None:
    """The optimizer's small steps aside, the encoder of a later stage is that of the one it starts from."""
    before, after = (
        AutoModelForSequenceClassification.from_pretrained(made.export(stage)).state_dict()
        for stage in ("layers", "student")
    )
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert float((before[name] - after[name]).abs().max()) < 4 * 1e-2 + 1e-6  # four steps of Adam at 1e-2
    pretrained = AutoModelForPreTraining.from_pretrained(made.export("pretrain")).state_dict()
    assert float((pretrained[name] - before[name]).abs().max()) < 4 * 1e-2 + 1e-6


def test_exports_load_with_plain_transformers(made: RunResult) -> None:
    folder = made.export("pretrain")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("the day was fine", "cold dark", return_tensors="pt")
    with quiet():
        model, report = AutoModelForPreTraining.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        masked, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
    with torch.no_grad():
        output = model(**inputs)
        torch.testing.assert_close(masked(**inputs).logits, output.prediction_logits)
    assert output.seq_relationship_logits.shape == (1, 2)
    with quiet():
        student, report = AutoModelForSequenceClassification.from_pretrained(
            made.export("student"), output_loading_info=True
        )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]  # no projection among them
    assert list(student.config.id2label.values()) == ["bad", "good"]
    assert AutoTokenizer.from_pretrained(made.export("student")).get_vocab() == tokenizer.get_vocab()


def test_a_second_call_redoes_nothing(made: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtkd.running.run.train", lambda *a: pytest.fail("trained"))
    assert mtkd.run(config(made.folder.parents[1])).results == made.results


def test_the_language_models_can_be_scored_instead(made: RunResult) -> None:
    """The stages are done; only the judgement is new."""
    found = mtkd.run(config(made.folder.parents[1], data="text", comparisons=[])).results
    assert list(found["models"]) == ["base"]
    assert 0 < found["models"]["base"]["overall"]["loss"] < 10
    assert list(mtkd.run(config(made.folder.parents[1])).results["models"]) == ["teacher", "student"]


def test_a_stage_of_another_task_cannot_be_scored(made: RunResult) -> None:
    folder = made.folder.parents[1]
    with pytest.raises(UserError, match="'base' cannot be scored on data 'task'") as caught:
        mtkd.plan(config(folder, stages=["student", "base"], comparisons=[]))
    assert caught.value.where == "evaluate.stages"
    assert {"teacher", "student"} <= set(caught.value.allowed)
    with pytest.raises(UserError, match=r"'pretrain'.*never learns to predict"):
        mtkd.plan(config(folder, stages=["student", "pretrain"], comparisons=[]))
    with pytest.raises(UserError, match="'pretrain' cannot be scored"):
        mtkd.plan(config(folder, ensembles=["pretrain"]))
    with pytest.raises(UserError, match="'base' is not scored") as caught:
        mtkd.plan(config(folder, comparisons=[{"candidate": "student", "baseline": "base"}]))
    assert caught.value.where == "evaluate.comparisons[0]"
    only_text = values(folder)
    only_text["stages"] = {"base": only_text["stages"]["base"]}
    only_text["evaluate"] = {"data": "task"}
    with pytest.raises(UserError, match="no stage of this run does the task"):
        mtkd.plan(RunConfig.model_validate(only_text))


def test_plan_knows_the_head_and_the_length_of_a_later_stage(made: RunResult) -> None:
    folder = made.folder.parents[1]
    longer = values(folder)
    longer["data"]["task"]["max_length"] = 64
    with pytest.raises(UserError, match="longer than the longest sequence of the earlier stage's model") as caught:
        mtkd.plan(RunConfig.model_validate(longer))
    assert caught.value.where == "stages.teacher.student"
    three = values(folder)
    three["data"]["task"]["labels"] = ["bad", "good", "none"]
    assert len(mtkd.plan(RunConfig.model_validate(three)).stages) == 5
    other = values(folder)
    other["stages"]["base"]["student"]["architecture"] = "roberta"
    with pytest.raises(UserError, match="next-sentence head"):
        mtkd.plan(RunConfig.model_validate(other))


RECIPES = Path(__file__).parents[2] / "configs" / "methods"


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("tinybert", {"general": 3, "task": 3, "prediction": "0:logits:soft_ce"}),
        ("glmd", {"pretrain": "0:logits:kl", "fine-tune": "0:logits:kl", "prediction": "0:logits:soft_ce"}),
    ],
)
def test_the_recipes_have_the_rows_of_their_steps(name: str, rows: dict[str, int | str], tmp_path: Path) -> None:
    plan = mtkd.plan(mtkd.load_config(RECIPES / f"{name}.yaml", [f"output={tmp_path}"]))
    found = {stage.name: stage.rows for stage in plan.stages}
    for stage, wanted in rows.items():
        assert len(found[stage]) == (wanted if isinstance(wanted, int) else 1)
        assert isinstance(wanted, int) or wanted in found[stage][0]
