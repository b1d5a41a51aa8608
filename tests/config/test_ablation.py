"""`evaluate.ablate` of a run file: which stages it stands for, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mtkd.config import RunConfig
from mtkd.config.ablation import BY_LOGITS, ON_LOGITS
from mtkd.methods.spec import METHODS
from mtkd.weightings.spec import WEIGHTINGS

TINY = {"architecture": "bert", "layers": 1, "width": 16, "heads": 2}
TUNE = {"kind": "finetune", "student": TINY, "steps": 3}


def values(ablate: Any = "teachers", *, task: str = "classify", stages: Any = None, **student: Any) -> dict[str, Any]:
    """Three teachers and a student of them; `student` changes its stage."""
    made = {"kind": "distill", "student": TINY, "method": "kd", "steps": 5, "seed": 3}
    made |= {"teachers": ["stage:a", "stage:b", {"model": "stage:c", "name": "third"}], **student}
    data = {"source": "files", "files": {"train": "a.jsonl", "test": "b.jsonl"}, "task": task}
    return {
        "name": "run",
        "data": {"text": data},
        "stages": {"a": TUNE, "b": TUNE, "c": TUNE, "student": made, "last": TUNE, **(stages or {})},
        "evaluate": {"ablate": ablate} if ablate is not None else {},
    }


def read(ablate: Any = "teachers", **changes: Any) -> RunConfig:
    return RunConfig.model_validate(values(ablate, **changes))


def added(config: RunConfig) -> list[str]:
    return [name for name in config.stages if name not in ("a", "b", "c", "student", "last")]


def test_every_teacher_is_left_out_once_from_one_cache() -> None:
    """Law: stages right behind the student's, equal to it but for the teachers, which one cache answers for."""
    config = read()
    names = ["student-teachers", "student-without-a", "student-without-b", "student-without-third"]
    assert list(config.stages) == ["a", "b", "c", "student", *names, "last"]
    cache = config.stages["student-teachers"]
    assert (cache.kind, [t.model.path for t in cache.teachers]) == ("cache", ["stage:a", "stage:b", "stage:c"])
    whole = config.stages["student"]
    assert [t.backend for t in whole.teachers] == ["resident"] * 3  # the user's own stage stays what it is
    for name, left in zip(names[1:], ("a", "b", "third"), strict=True):
        stage = config.stages[name]
        assert [t.name for t in stage.teachers] == [t for t in ("a", "b", "third") if t != left]
        assert all(t.model.path == f"stage:student-teachers/{t.name}" and t.backend == "cached" for t in stage.teachers)
        assert stage.model_dump(exclude={"teachers"}) == whole.model_dump(exclude={"teachers"})
    pairs = [(pair.candidate, pair.baseline) for pair in config.evaluate.comparisons]
    assert pairs == [("student", name) for name in names[1:]]


def test_alone_and_both() -> None:
    alone = [f"student-alone-{name}" for name in ("a", "b", "third")]
    assert added(read({"teachers": "alone"})) == ["student-teachers", *alone]
    assert [t.name for t in read({"teachers": "alone"}).stages["student-alone-b"].teachers] == ["b"]
    both = read({"teachers": "both", "cache": False})
    assert added(both) == [f"student-without-{name}" for name in ("a", "b", "third")] + alone
    two = read({"teachers": "both", "cache": False}, teachers=["stage:a", "stage:b"])
    assert added(two) == ["student-without-a", "student-without-b"]  # one left out is the other alone


def test_the_expanded_run_is_read_again_as_it_is() -> None:
    """Law: the run folder's copy has the stages already, and knows which stage was ablated; another is last by now."""
    once = read()
    again = RunConfig.model_validate(once.model_dump(exclude_unset=True))
    assert again == once
    assert once.evaluate.ablate is not None
    assert once.evaluate.ablate.stage == "student"


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "causal-lm"},
        {"method": "tinybert"},
        {"match": [{"feature": "hidden", "loss": "mse"}]},
        {"weighting": "mgda"},
        {"transforms": ["mine"]},
    ],
)
def test_teachers_run_live_where_class_logits_are_not_enough(changes: dict[str, Any]) -> None:
    config = read(**changes)
    assert "student-teachers" not in config.stages
    assert [t.backend for t in config.stages["student-without-a"].teachers] == ["resident", "resident"]
    with pytest.raises(ValidationError, match=r"evaluate.ablate.cache: .*cannot serve stage 'student'"):
        read({"cache": True}, **changes)


def test_a_stage_that_reads_caches_is_ablated_from_the_same_caches() -> None:
    teachers = [{"name": n, "model": f"stage:kept/{n}", "backend": "cached"} for n in ("a", "b")]
    made = values(teachers=teachers)
    stages = dict(made["stages"])
    student, last = stages.pop("student"), stages.pop("last")
    made["stages"] = {**stages, "kept": {"kind": "cache", "teachers": ["stage:a", "stage:b"]}, "student": student}
    made["stages"]["last"] = last
    config = RunConfig.model_validate(made)
    assert added(config) == ["kept", "student-without-a", "student-without-b"]
    assert config.stages["student-without-a"].teachers == config.stages["student"].teachers[1:]


def test_options_that_name_teachers_lose_those_left_out() -> None:
    weights = {"a": 1.0, "b": 2.0, "third": 3.0}
    config = read({"teachers": "both"}, weighting={"name": "fixed", "options": {"weights": weights}})
    found = {name: config.stages[name].weighting.options for name in added(config)[1:]}
    assert found["student-without-b"] == {"weights": {"a": 1.0, "third": 3.0}}
    assert found["student-alone-third"] == {"weights": {"third": 3.0}}
    assert config.stages["student"].weighting.options == {"weights": weights}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"weighting": "route"}, "stages.student.weighting: 'route' takes the teacher that a row names"),
        (
            {"weighting": {"name": "mine", "options": {"prior": [0.2, 0.3, 0.5]}}},
            "stages.student.weighting.options.prior: .*give a mapping from the teachers' names",
        ),
        ({"weighting": {"name": "mine", "options": {"best": "a"}}}, "stages.student.weighting.options.best"),
        ({"teachers": ["stage:a"]}, "no stage has several teachers"),
        (
            {"stages": {"student-without-b": TUNE}},
            "stages.student-without-b: `evaluate.ablate` makes another.*change the file",
        ),
        ({"ablate": {"stage": "nobody"}}, "'nobody' is not a stage; stages with several are: student"),
        ({"ablate": {"stage": "a"}}, "'a' has not several teachers"),
        ({"ablate": {"teachers": "some"}}, "'without', 'alone' or 'both'"),
        ({"ablate": "everything"}, "evaluate.ablate\n.*ablate is `teachers`, or a block"),
        ({"ablate": True}, "ablate is `teachers`, or a block"),
    ],
)
def test_what_cannot_be_ablated_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        read(**changes)


def test_a_student_of_another_task_than_the_evaluation_is_refused() -> None:
    made = values(data="text")
    made["data"]["other"] = {**made["data"]["text"], "task": "causal-lm"}
    made["evaluate"]["data"] = "other"
    for stage in made["stages"].values():
        stage.setdefault("data", "text")
    with pytest.raises(ValidationError, match=r"another task than `evaluate.data`"):
        RunConfig.model_validate(made)


def test_a_name_that_gets_too_long_is_refused() -> None:
    made = values()
    made["stages"]["student"]["teachers"][2]["name"] = "x" * 95
    with pytest.raises(ValidationError, match=r"cannot be made: .*100 characters"):
        RunConfig.model_validate(made)


def test_a_list_of_scored_stages_gets_the_new_ones() -> None:
    made = values()
    made["evaluate"]["stages"] = ["a", "student"]
    config = RunConfig.model_validate(made)
    assert config.evaluate.stages == ("a", "student", *added(config)[1:])


def test_the_methods_and_weightings_that_a_cache_serves_are_those_that_read_logits_alone() -> None:
    """Law: the names that the configuration knows are what the registries say of them."""
    for name in ON_LOGITS:
        assert {row.feature for row in METHODS[name]().values()} == {"logits"}
    for name in BY_LOGITS:
        reads = WEIGHTINGS[name].reads({}, 2)
        assert reads is not None
        assert reads.names <= {"ce", "entropy", "confidence", "margin", "energy", "own_mass"}
