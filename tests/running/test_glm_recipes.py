"""Runs of GLM's tasks: the recipes at their own size as far as a plan goes, in small from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from golden_recipes import made_up_documents
from tiny_glm import cloze_model, stage, tokenizer, values
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import mtkd
from mtkd.config import RunConfig
from mtkd.engine.dist import Dist
from mtkd.errors import UserError
from mtkd.models.glm import GLMForConditionalGeneration, GLMForSequenceClassification
from mtkd.planning.data import DataReader
from mtkd.planning.plan import resolve
from mtkd.running.run import _specify

RECIPES = Path(__file__).parents[2] / "configs" / "glm"


def config(folder: Path, stages: dict[str, Any], data: dict[str, Any] | None = None, **more: Any) -> RunConfig:
    whole = {**values(folder, **(data or {})), "stages": stages}
    whole |= {key: {**whole.get(key, {}), **value} for key, value in more.items()}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(whole, sort_keys=False))
    return mtkd.load_config(file)


LEARNS = {"steps": 60, "optimizer": {"lr": 3e-3}}
# The published counts are those of the weights' padded 50,304 rows; a fresh model has the tokenizer's own 50,266.
UNPADDED = 1_920_122_880 - 38 * 2048


def test_the_recipes_are_planned_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published numbers of parameters, stages and rows; what is missing is named with the command."""
    monkeypatch.chdir(tmp_path)
    plan = mtkd.plan(mtkd.load_config(RECIPES / "glm10b-to-2b.yaml"))
    found = {(s.name, m.role): m.parameters for s in plan.stages for m in s.models}
    assert found["pretrain", "glm-10b"] == found["teacher", "student"] == 9_880_682_496
    assert found["pretrain", "student"] == found["prediction", "student"] == UNPADDED
    assert [s.rows for s in plan.stages if s.name == "prediction"] == [["1 x 0:logits:soft_ce"]]
    missing, *data = plan.missing
    assert "THUDM/glm-10b" in missing
    assert "mtkd convert-glm" in missing
    assert {each.partition(":")[0] for each in data} <= {
        "data.text",
        "data.task",
        "data.task-text",
    }  # fewer where the hub's are here
    chain = mtkd.plan(mtkd.load_config(RECIPES / "chain.yaml"))
    assert [stage.name for stage in chain.stages] == ["glm-7b", "student", "direct"]
    assert chain.stages[0].models[0].parameters == pytest.approx(7.06e9, rel=1e-3)
    assert [m.role for m in chain.stages[1].models] == ["student", "glm-7b"]


@pytest.mark.parametrize("task", ["text", "task"])
def test_a_tokenizer_without_commands_is_refused_at_plan_time(tmp_path: Path, task: str) -> None:
    made = config(tmp_path, {"model": stage(task)}, tokenizer={"commands": "plain"}, evaluate={"data": task})
    with pytest.raises(UserError, match=r"missing: \[MASK\], <\|startofpiece\|>") as caught:
        mtkd.plan(made)
    assert "commands: glm" in str(caught.value)


def test_examples_that_have_no_room_for_a_blank_are_refused_at_plan_time(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no room for a blank"):
        mtkd.plan(config(tmp_path, {"model": stage("text")}, {"max_length": 3}, evaluate={"data": "text"}))


@pytest.mark.parametrize("name", ["glm10b-to-2b", "chain"])
def test_a_recipe_without_its_teacher_is_refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = mtkd.load_config(RECIPES / f"{name}.yaml", [f"output={tmp_path}"])
    with pytest.raises(UserError, match="convert-glm FOLDER glm-10b"):
        _specify(
            resolve(recipe), DataReader(recipe.base), Dist(), []
        )  # of `mtkd.run`, which would start DeepSpeed first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("large", "small"), [("glm10b-to-2b", "toy"), ("chain", "toy-chain")])
def test_the_small_recipes_are_the_large_ones(tmp_path: Path, large: str, small: str) -> None:
    """The same stages, tasks and methods; one stage more, which makes what is loaded there."""

    def shape(name: str) -> dict[str, Any]:
        recipe = mtkd.load_config(RECIPES / f"{name}.yaml")
        recipe = recipe if recipe.stages and recipe.chain is None else resolve(recipe)
        made = {}
        for stage_name, each in recipe.stages.items():
            if stage_name == "published":
                continue
            paths = [m.path for m in (*each.trained.values(), *(t.model for t in each.teachers))]
            method = each.method and (each.method.name, dict(each.method.options))
            task = recipe.data[recipe.data_name(each.data)].task
            made[stage_name] = (each.kind, task, method, [p and p.replace("stage:published", "glm-10b") for p in paths])
        return made

    assert shape(large) == shape(small)
    assert len(shape(large)) >= 3


def shortened(name: str, folder: Path) -> RunConfig:
    """A small recipe with few documents and steps."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    values |= {"output": str(folder), "engine": {"kind": "torch", "device": "cpu", "precision": "fp32", "threads": 1}}
    for data in values["data"].values():
        data["limit"] = {"train": 40, "validation": 6, "test": 12}
    for each in (*values["stages"].values(), *([values["chain"]] if "chain" in values else [])):
        each["steps"] = 2
    values["evaluate"] = {**values.get("evaluate", {}), "resamples": 100}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return mtkd.load_config(file)


@pytest.mark.slow
@pytest.mark.usefixtures("reports")
def test_the_toy_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two tasks, with every stage's model as transformers' own class, and a report."""
    monkeypatch.setattr("mtkd.data.sources.stdlib_documents", made_up_documents)
    result = mtkd.run(shortened("toy", tmp_path))
    assert result.results["task"] == "glm-cloze"
    assert set(result.results["models"]) == {"teacher", "prediction", "labels-only"}
    assert all("accuracy" in model["overall"] for model in result.results["models"].values())
    assert result.results["comparisons"]
    assert "prediction" in result.report.read_text()
    model = AutoModelForSequenceClassification.from_pretrained(result.export("prediction"))
    assert isinstance(model, GLMForSequenceClassification)
    assert model.cloze is not None
    assert "[gMASK]" in AutoTokenizer.from_pretrained(result.export("prediction")).get_vocab()
    assert isinstance(AutoModelForCausalLM.from_pretrained(result.export("pretrain")), GLMForConditionalGeneration)


@pytest.mark.slow
@pytest.mark.usefixtures("reports")
def test_the_toy_chain_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher, rung, student and the control that skips the rung; compared with each other."""
    monkeypatch.setattr("mtkd.data.sources.stdlib_documents", made_up_documents)
    result = mtkd.run(shortened("toy-chain", tmp_path))
    assert set(result.results["models"]) == {"published", "glm-7b", "student", "direct"}
    assert all(model["overall"]["perplexity"] > 1 for model in result.results["models"].values())
    (pair,) = result.results["comparisons"][:1]
    assert (pair["candidate"], pair["baseline"]) == ("student", "direct")
    assert "glm-7b" in result.report.read_text()


@pytest.mark.slow
def test_a_student_learns_a_cloze_from_its_teacher(tmp_path: Path) -> None:
    """A cloze teaches blanks, and a language model's weights become a cloze: neither has a head of its own."""
    stages = {
        "teacher": stage("task", {"architecture": "glm_blocklm", "layers": 2, "width": 48, "heads": 4}, **LEARNS),
        "pretrain": stage("text", teachers=["stage:teacher"], method="glmd", steps=4),
        "blank": stage("text", "stage:pretrain", steps=2),
        "student": stage(
            "task",
            "stage:pretrain",
            teachers=["stage:teacher", "stage:blank"],
            method="mt_bert",
            match=[{"replace": "hidden", "loss": "mse", "weight": 0.0}],
            weighting="confidence",
            **LEARNS,
        ),
    }
    result = mtkd.run(config(tmp_path, stages))
    found = {name: model["overall"]["accuracy"] for name, model in result.results["models"].items()}
    assert set(found) == {"teacher", "student"}  # the others' models are language models
    assert min(found.values()) > 0.85


@pytest.mark.slow
def test_a_cache_of_blanks_that_are_drawn_once(tmp_path: Path) -> None:
    """The student of a cache with every token's mass learns what that of the live teacher does."""
    student = {"match": [{"feature": "logits", "loss": "kl"}], "steps": 8}
    stages = {
        "teacher": stage("text"),
        "cache": {"kind": "cache", "data": "text", "teachers": ["stage:teacher"], "cache": {"k": 330, "bits": 12}},
        "live": stage("text", teachers=["stage:teacher"], **student),
        "read": stage(
            "text", teachers=[{"name": "teacher", "model": "stage:cache/teacher", "backend": "cached"}], **student
        ),
    }
    evaluate = {"data": "text"}
    result = mtkd.run(config(tmp_path, stages, {"redraw": False}, evaluate=evaluate))
    live, read = (result.results["models"][name]["overall"]["loss"] for name in ("live", "read"))
    assert read == pytest.approx(live, rel=1e-3)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ({"x": stage("text", {"architecture": "llama", "layers": 1, "width": 16, "heads": 4})}, "is for glm_blocklm"),
        ({"x": stage("task", {"architecture": "bert", "layers": 1, "width": 16, "heads": 4})}, "is for glm_blocklm"),
        ({"x": stage("text", batch={"tokens": 256, "packing": True})}, "two parts"),
        (
            {"x": stage("text"), "c": {"kind": "cache", "data": "text", "teachers": ["stage:x"]}},
            "redraw: false",
        ),
        (
            {"x": stage("task"), "y": stage("task", teachers=["stage:x"], method="minilm")},
            "cannot come from the student",
        ),
    ],
)
def test_what_a_plan_refuses(tmp_path: Path, stages: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mtkd.plan(config(tmp_path, stages, evaluate={"data": next(iter(stages.values()))["data"]}))


def test_a_cloze_keeps_the_whole_vocabulary(tmp_path: Path) -> None:
    shape = {"architecture": "glm_blocklm", "layers": 1, "width": 16, "heads": 4}
    small = {**shape, "vocabulary": {"keep": 0.9, "counts": "text"}}
    stages = {"t": stage("task"), "x": stage("task", small, teachers=["stage:t"], method="kd")}
    with pytest.raises(UserError, match="cannot be compressed"):
        mtkd.plan(config(tmp_path, stages))
    stages = {
        "t": stage("text"),
        "x": stage("text", small, teachers=["stage:t"], method="kd"),
        "y": stage("task", "stage:x"),
    }
    with pytest.raises(UserError, match="has a part of it"):
        mtkd.plan(config(tmp_path, stages))


def test_words_beyond_the_model_are_refused_at_plan_time(tmp_path: Path) -> None:
    whole = values(tmp_path)
    whole["data"]["task"] |= {"max_length": 8, "verbalizers": {"good": " warm", "bad": " cold" * 9}}
    whole |= {"stages": {"x": stage("task")}}
    with pytest.raises(UserError, match="longer than the model's positions"):
        mtkd.plan(RunConfig.model_validate(whole))


def test_a_cloze_of_somebody_else_is_for_the_cloze_task(tmp_path: Path) -> None:
    """Task classify would cut its blank off; task glm-cloze asks with the words of the data."""
    folder = tmp_path / "cloze"
    cloze_model(16, 1, 0).model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    whole = values(tmp_path)
    whole |= {"tokenizer": {"path": str(folder)}, "stages": {"x": stage("task", str(folder))}}
    whole["data"]["task"]["verbalizers"] = {"good": " day", "bad": " long day"}
    plan = mtkd.plan(RunConfig.model_validate(whole))
    assert plan.stages[0].models[0].architecture == "glm_blocklm"
    plain = {key: value for key, value in whole["data"]["task"].items() if key not in ("cloze", "verbalizers")}
    whole["data"]["task"] = {**plain, "task": "classify", "labels": ["bad", "good"]}
    with pytest.raises(UserError, match="task: glm-cloze"):
        mtkd.plan(RunConfig.model_validate(whole))
