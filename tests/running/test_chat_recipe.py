"""The recipe for chats mixed with instructions: planned, and run for a step per stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mtkd
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl

RECIPE = Path(__file__).parents[2] / "configs" / "generative" / "chat.yaml"
STAGES = ("first-teacher", "second-teacher", "student", "labels-only")


def test_the_recipe_is_two_teachers_a_student_and_its_control(tmp_path: Path) -> None:
    config = load_config(RECIPE, [f"output={tmp_path}"])
    stages = {stage.name: stage for stage in mtkd.plan(config).stages}
    assert stages["student"].needs == ["first-teacher", "second-teacher"]
    assert stages["student"].models[0] == stages["labels-only"].models[0]
    control, student = config.stages["labels-only"], config.stages["student"]
    assert (control.steps, control.batch, control.optimizer) == (student.steps, student.batch, student.optimizer)


@pytest.mark.slow
def test_the_recipe_runs_and_scores_each_part(tmp_path: Path) -> None:
    """Every held-out row of both files has a score, of what its assistant says and ends with."""
    short = [f"stages.{stage}.{key}" for stage in STAGES for key in ("steps=1", "evaluate_every=1")]
    done = mtkd.run(load_config(RECIPE, [f"output={tmp_path}", "evaluate.resamples=50", *short]))
    assert set(done.stages) == set(STAGES)
    scores = read_jsonl(tmp_path / "chat" / "stages" / "03-student" / "scores.jsonl")
    chats = (RECIPE.parent / "chats.jsonl").read_text().splitlines()
    questions = json.loads((RECIPE.parent / "instructions.json").read_text())
    count = {part: sum(line["domain"] == part for line in scores) for part in ("chats", "instructions")}
    assert count == {"chats": len(chats) // 5, "instructions": len(questions) // 5}
