"""The recipe for instruction data, and packed stages: planned, run, refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_run import tiny_config, write_yaml

import mtkd
from mtkd.config.read import load_config
from mtkd.errors import DataError, UserError
from mtkd.models.packing import Layout, make_layout

RECIPE = Path(__file__).parents[2] / "configs" / "generative" / "instruct.yaml"
SHORT = [f"stages.{s}.{key}" for s in ("first-teacher", "second-teacher", "student", "labels-only")
         for key in ("steps=2", "evaluate_every=1")]  # fmt: skip


def test_the_recipe_is_two_teachers_a_student_and_its_control(tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"output={tmp_path}"])
    assert config.data["instructions"].prompt_columns == ("instruction", "input")
    stages = {stage.name: stage for stage in mtkd.plan(config).stages}
    assert stages["student"].needs == ["first-teacher", "second-teacher"]
    assert stages["student"].models[0] == stages["labels-only"].models[0]
    assert all(stage.batch.packing for stage in config.stages.values())


@pytest.mark.slow
def test_the_recipe_runs_and_goes_on_from_models_on_disk(tmp_path: Path) -> None:
    """What its comments promise: tokenizer, teachers, student and data by one override each."""
    done = mtkd.run(load_config(RECIPE, [f"output={tmp_path}", "evaluate.resamples=50", *SHORT]))
    assert set(done.stages) == {"first-teacher", "second-teacher", "student", "labels-only"}
    rows = json.loads((RECIPE.parent / "instructions.json").read_text())
    scores = (tmp_path / "instruct" / "stages" / "03-student" / "scores.jsonl").read_text().splitlines()
    assert len(scores) == len(rows) // 5
    assert {json.loads(line)["bytes"] for line in scores} <= {len(row["output"].encode()) for row in rows}
    more = [
        {"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(1, n)))} for n in range(2, 40)
    ]
    (tmp_path / "more.json").write_text(json.dumps(more))
    models = {name: str(done.export(name)) for name in ("first-teacher", "student")}
    again = [
        f"tokenizer={{path: {models['student']}}}",
        f"stages.first-teacher.student={{path: {models['first-teacher']}}}",
        f"stages.student.student={{path: {models['student']}}}",
        f"data.instructions.files.train={tmp_path / 'more.json'}",
    ]
    config = load_config(RECIPE, [f"output={tmp_path / 'again'}", "evaluate.resamples=50", *SHORT, *again])
    assert set(mtkd.run(config).stages) == set(done.stages)


@pytest.mark.parametrize(
    "engine",
    [{}, pytest.param({"activation_checkpointing": True}, marks=pytest.mark.slow)],
    ids=["plain", "recomputed"],
)
def test_a_packed_stage_learns_the_same(
    tmp_path: Path, engine: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same losses to rounding, from rows that were really packed (two roundings may agree: they tell nothing)."""
    losses, layouts = list[list[float]](), list[bool]()

    def counted(*args: Any, **named: Any) -> Layout | None:
        made = make_layout(*args, **named)
        layouts.append(made is not None)
        return made

    monkeypatch.setattr(mtkd.models.taps, "make_layout", counted)
    for packing in (False, True):
        folder = tmp_path / str(packing)
        folder.mkdir()
        stages = {name: {"batch": {"sequences": 8, "packing": packing}, "student": {"dropout": 0.0}}
                  for name in ("teacher", "student")}  # fmt: skip
        mtkd.run(tiny_config(folder, stages=stages, engine=engine, log_every=1))
        lines = (folder / "runs" / "tiny" / "metrics.jsonl").read_text().splitlines()
        assert packing or not layouts
        losses.append([r["loss"] for r in map(json.loads, lines) if "loss" in r])
    assert len(losses[0]) >= 11
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert any(layouts)


def test_what_cannot_be_packed_is_refused_at_plan_time(tmp_path: Path) -> None:
    encoder = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
    stages = {"teacher": {"student": encoder, "batch": {"sequences": 8, "packing": True}}, "student": None}
    file = write_yaml(tmp_path, data={"text": {"task": "masked-lm"}}, stages=stages,
                      evaluate={"comparisons": [], "ensembles": []})  # fmt: skip
    with pytest.raises(UserError, match="bert' cannot be run on packed rows") as refused:
        mtkd.plan(load_config(file))
    assert "stages.teacher.batch.packing" in str(refused.value)
    for batch, text in (
        ({"sequences": None, "tokens": 9, "group_by_length": True}, "goes with `sequences`"),
        ({"sequences": 9, "packing": True, "group_by_length": True}, "no padding to save"),
    ):
        with pytest.raises(UserError, match=text):
            tiny_config(tmp_path, stages={"teacher": {"batch": batch}})


def test_a_chat_without_a_template_is_refused_at_plan_time(tmp_path: Path) -> None:
    """The tokenizer that a run trains has none."""
    with pytest.raises(DataError, match="no chat template") as refused:
        mtkd.plan(load_config(RECIPE, [f"output={tmp_path}", "data.instructions.chat=true"]))
    assert refused.value.where == "data.instructions.chat"
