"""The recipes of on-policy distillation: what they promise, planned and run in a few steps."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtkd
from mtkd.config import RunConfig
from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl

CONFIGS = Path(__file__).parents[2] / "configs" / "generative"


def recipe(name: str, folder: Path) -> RunConfig:
    file = CONFIGS / f"{name}.yaml"
    stages = load_config(file).stages
    short = [f"stages.{stage}.{key}" for stage in stages for key in ("steps=2", "evaluate_every=2")]
    return load_config(file, [f"output={folder}", "evaluate.resamples=50", "log_every=1", *short])


@pytest.mark.parametrize(("name", "teachers"), [("on-policy", 2), ("mopd", 3)])
def test_the_student_writes_and_its_controls_have_its_start(name: str, teachers: int, tmp_path: Path) -> None:
    config = recipe(name, tmp_path)
    stages = {stage.name: stage for stage in mtkd.plan(config).stages}
    assert config.stages["student"].rollout is not None
    assert len(config.stages["student"].teachers) == teachers
    for stage in set(stages) - {"words", "more-words", "stories", "cold"}:
        assert "cold" in stages[stage].needs
        assert stages[stage].models[0] == stages["student"].models[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["on-policy", "mopd"])
def test_a_recipe_runs(name: str, tmp_path: Path) -> None:
    mtkd.run(recipe(name, tmp_path))
    lines = read_jsonl(tmp_path / name / "metrics.jsonl")
    assert any("rollout/length" in line for line in lines if line["stage"] == "student")
