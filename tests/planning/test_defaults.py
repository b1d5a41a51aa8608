"""The weighting of a stage that names none: the posterior per token of causal language models, else uniform."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rollout_runs import rollout_config
from tiny_run import tiny_config

import mtkd
from mtkd.config import Named
from mtkd.planning.defaults import chosen_for
from mtkd.planning.plan import resolve

TWO = {"teachers": ["stage:teacher", {"model": "stage:teacher", "name": "again"}], "per": "token"}
CACHE = {"kind": "cache", "teachers": ["stage:teacher"]}
CACHED = [{"model": "stage:c/teacher", "backend": "cached"}, {"model": "stage:teacher", "name": "live"}]
LABELS = [{"feature": "logits", "loss": "ce", "target": "labels"}]
HIDDEN = [{"feature": "hidden", "loss": "mse", "student_layer": 1, "teacher_layer": 1}]
UNIFORM = Named(name="uniform")


def weighting(folder: Path, rollout: dict[str, Any] | None, student: dict[str, Any], **stages: Any) -> Named:
    config = rollout_config(folder, rollout, student={**TWO, **student}, stages=stages)
    return resolve(config).stages["student"].weighting


def cache(*traits: str) -> dict[str, Any]:
    return {**CACHE, "cache": {"k": 4, "traits": list(traits)}}


def test_a_weight_per_token_is_the_posterior(tmp_path: Path) -> None:
    """Law: as if it had been named, in what is resolved once and twice; the plan says that it was chosen."""
    named = resolve(rollout_config(tmp_path / "a", None, student={**TWO, "weighting": "posterior"}))
    config = resolve(rollout_config(tmp_path / "b", None, student=TWO))
    stage = config.stages["student"]
    assert stage.weighting == named.stages["student"].weighting == Named(name="posterior")
    assert resolve(config) == config
    assert [chosen_for(each.stages["student"]) for each in (config, resolve(config), named)] == [True, True, False]
    notes = {each.name: " ".join(each.notes) for each in mtkd.plan(config).stages}
    assert "weighting: posterior" in notes["student"]
    assert "weighting" not in notes["teacher"]
    assert "weighting" not in " ".join(" ".join(each.notes) for each in mtkd.plan(named).stages)


@pytest.mark.parametrize(
    ("rollout", "student"),
    [
        (None, {"per": "example"}),
        (None, {"teachers": ["stage:teacher"]}),
        (None, {"weighting": "uniform"}),
        (None, {"match": LABELS}),
        (None, {"match": HIDDEN}),
        ({"share": 1.0}, {}),
    ],
)
def test_elsewhere_it_is_uniform(tmp_path: Path, rollout: dict[str, Any] | None, student: dict[str, Any]) -> None:
    assert weighting(tmp_path, rollout, student) == UNIFORM


def test_a_rollout_of_nothing_changes_nothing(tmp_path: Path) -> None:
    assert weighting(tmp_path, {"share": 0.0}, {}).name == "posterior"


@pytest.mark.parametrize(
    ("kept", "teacher", "name"),
    [
        (cache(), {}, "uniform"),
        (cache("entropy"), {}, "uniform"),
        (cache("token_log_probs"), {}, "posterior"),
        (cache("token_log_probs"), {"calibrate": {"temperature": 2.0}}, "uniform"),
    ],
)
def test_caches_decide_by_what_they_keep(
    tmp_path: Path, kept: dict[str, Any], teacher: dict[str, Any], name: str
) -> None:
    plain = rollout_config(tmp_path, None, student=TWO).stages["student"]
    late = {**plain.model_dump(exclude_unset=True), "teachers": [{**CACHED[0], **teacher}, CACHED[1]]}
    config = rollout_config(tmp_path, None, stages={"student": None, "c": kept, "late": late})
    assert resolve(config).stages["late"].weighting.name == name


def test_a_cache_in_a_folder_decides_by_what_it_keeps(tmp_path: Path) -> None:
    """Law: as with a cache of the same run."""
    for number, (kept, name) in enumerate(((cache(), "uniform"), (cache("token_log_probs"), "posterior"))):
        made = rollout_config(tmp_path / str(number), None, stages={"student": None, "c": kept})
        mtkd.run(made)
        folder = made.folder / "stages/02-c/export/teacher"
        teachers = [{"model": str(folder), "backend": "cached", "name": "kept"}, CACHED[1]]
        again = rollout_config(tmp_path / str(number), None, student={**TWO, "teachers": teachers}, name="again")
        assert resolve(again).stages["student"].weighting.name == name
        mtkd.plan(again)
    teachers[0]["model"] = str(tmp_path / "nowhere")
    lost = rollout_config(tmp_path / "1", None, student={**TWO, "teachers": teachers}, name="lost")
    with pytest.raises(mtkd.UserError, match="no folder of a cache"):
        mtkd.plan(lost)


def test_a_student_with_a_part_of_the_ids_keeps_uniform_weights(tmp_path: Path) -> None:
    """Law: also where it goes on from such a student; the plan accepts both."""
    small = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2, "vocabulary": {"keep": 0.5}}
    config = resolve(rollout_config(tmp_path, None, student={**TWO, "student": small}))
    assert config.stages["student"].weighting == UNIFORM
    mtkd.plan(config)


def test_classifiers_keep_uniform_weights(tmp_path: Path) -> None:
    config = resolve(tiny_config(tmp_path))
    assert all(stage.weighting == UNIFORM for stage in config.stages.values())
