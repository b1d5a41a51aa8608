"""Expand `evaluate.ablate`: the student of a stage once more per teacher that is left out, or alone, as plain stages.

The expansion depends on the configuration alone, as that of a chain, so that run, plan, resume and status see the same
stages. Everything but the teachers is that of the stage: student, rows, weighting, steps, data, seed.

Where whole class logits serve all of it, one cache stage answers for the teachers: it gives what the teachers give.
A cache of tokens keeps some columns, which would make another experiment, so teachers of tokens run live, unless the
stage itself reads caches: then all students read the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from mtkd.config.base import check_name
from mtkd.config.evaluate import Ablation, Comparison, EvaluateConfig
from mtkd.config.refs import StageRef
from mtkd.config.stage import StageConfig
from mtkd.config.teacher import TeacherConfig

WHERE = "evaluate.ablate"

# Methods whose rows compare logits alone, and weightings that read logits and labels alone: whole class logits, with
# those of outputs that mean no class, serve them. Others have live teachers, which is never wrong.
ON_LOGITS = frozenset({"kd", "dkd", "dist"})
BY_LOGITS = frozenset(
    {"uniform", "fixed", "drop", "confidence", "margin", "entropy", "energy", "mt_bert", "ca_mkd", "abstain"}
)


@dataclass(frozen=True)
class Ablated:
    """One more student of an ablation.

    Attributes:
        name: of its stage.
        teacher: the one that is left out, or the only one.
        alone: it is the only one.
    """

    name: str
    teacher: str
    alone: bool


def ablated_stages(ablation: Ablation, teachers: Sequence[str]) -> list[Ablated]:
    """The students of an ablation whose stage is known.

    Args:
        teachers: names of the stage's teachers, in order.
    """
    without = [Ablated(f"{ablation.stage}-without-{name}", name, False) for name in teachers]
    alone = [Ablated(f"{ablation.stage}-alone-{name}", name, True) for name in teachers]
    if ablation.teachers == "both":
        # Of two teachers, one left out is the other alone.
        return [*without, *alone] if len(teachers) > 2 else without
    return alone if ablation.teachers == "alone" else without


def cache_name(ablation: Ablation) -> str:
    """The stage that caches the teachers."""
    return f"{ablation.stage}-teachers"


def chosen_stage(ablation: Ablation, stages: Mapping[str, StageConfig]) -> str:
    """The stage that is ablated; without a name the last one that has several teachers.

    Raises:
        ValueError: there is none, or it has no teacher to leave out.
    """
    several = [n for n, stage in stages.items() if stage.kind == "distill" and len(stage.teachers) > 1]
    if not ablation.stage:
        if not several:
            raise ValueError(f"{WHERE}: no stage has several teachers, so there is none to leave out; drop it")
        return several[-1]
    if ablation.stage not in several:
        known = ablation.stage in stages
        reason = "has not several teachers, so there is none to leave out" if known else "is not a stage"
        raise ValueError(
            f"{WHERE}.stage: {ablation.stage!r} {reason}; stages with several are: {', '.join(several) or 'none'}"
        )
    return ablation.stage


def expand_ablation(
    evaluate: EvaluateConfig, stages: Mapping[str, StageConfig], *, classes: bool
) -> tuple[dict[str, StageConfig], EvaluateConfig]:
    """The stages of a run with those of its ablation, and the evaluation that scores and compares them.

    They stand right behind the stage. An equal stage that exists already (in the run folder's copy) keeps its place.

    Args:
        evaluate: whose `ablate` names its stage.
        classes: the stage's targets are classes.

    Raises:
        ValueError: a name is taken by another stage, or an option of the weighting cannot lose a teacher.
    """
    ablation = evaluate.ablate
    assert ablation is not None
    stage = stages[ablation.stage]
    students = ablated_stages(ablation, [teacher.name for teacher in stage.teachers])
    made: dict[str, StageConfig] = {}
    cached = uses_cache(ablation, stage, classes=classes)
    if cached:
        made[check_name(cache_name(ablation))] = _stage(
            {
                "kind": "cache",
                **({"data": stage.data} if stage.data else {}),
                "teachers": [teacher.model_dump(exclude_unset=True) for teacher in stage.teachers],
            },
            cache_name(ablation),
        )
    for student in students:
        made[_checked(student.name)] = _without(stage, ablation, student, cached=cached)
    for name in made.keys() & stages.keys():
        if stages[name].model_dump(mode="json") != made[name].model_dump(mode="json"):
            raise ValueError(
                f"stages.{name}: `{WHERE}` makes another stage of this name; rename or remove this one (of a run's own "
                "run.yaml change the file that it was made of)"
            )
    order: dict[str, StageConfig] = {}
    for name, present in stages.items():
        order[name] = present
        if name == ablation.stage:
            order |= {each: made[each] for each in made if each not in stages}
    return order, _scored(evaluate, ablation, [student.name for student in students])


def uses_cache(ablation: Ablation, stage: StageConfig, *, classes: bool) -> bool:
    """Whether a cache stage is made for the teachers; `cache` of the ablation decides where it is given.

    Args:
        classes: the stage's targets are classes.
    """
    possible = (
        classes
        and not stage.transforms
        and all(not teacher.no_cache for teacher in stage.teachers)
        and (stage.method is None or stage.method.name in ON_LOGITS)
        and all(row.feature == "logits" for row in stage.match)
        and stage.weighting.name in BY_LOGITS
        and stage.student is not None
        and stage.student.vocabulary is None
    )
    if ablation.cache and not possible:
        raise ValueError(
            f"{WHERE}.cache: a cache of class logits cannot serve stage {ablation.stage!r}; it serves classes, rows on "
            f"logits (match, or method {', '.join(sorted(ON_LOGITS))}), weightings {', '.join(sorted(BY_LOGITS))}, and "
            "teachers that run, without transforms; drop cache, or cache the teachers in a stage that the student reads"
        )
    return possible and ablation.cache is not False


def _checked(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise ValueError(f"{WHERE}: the stage {name!r} cannot be made: {error}") from None


def _without(stage: StageConfig, ablation: Ablation, student: Ablated, *, cached: bool) -> StageConfig:
    kept = [teacher for teacher in stage.teachers if (teacher.name == student.teacher) == student.alone]
    values = stage.model_dump(exclude_unset=True)
    values["teachers"] = [_teacher(teacher, ablation, cached=cached) for teacher in kept]
    if stage.weighting.options:
        names = [teacher.name for teacher in stage.teachers]
        values["weighting"] = {
            "name": stage.weighting.name,
            "options": {
                key: _fewer(value, names, [t.name for t in kept], f"stages.{ablation.stage}.weighting.options.{key}")
                for key, value in stage.weighting.options.items()
            },
        }
    if stage.weighting.name == "route":
        raise ValueError(
            f"stages.{ablation.stage}.weighting: 'route' takes the teacher that a row names, and rows that name one "
            f"which is left out would have none; {WHERE} needs another weighting"
        )
    if any(teacher.domains for teacher in stage.teachers):
        raise ValueError(
            f"stages.{ablation.stage}.teachers: with `domain`, texts of a teacher that is left out would have none; "
            f"{WHERE} needs teachers that teach every text"
        )
    return _stage(values, student.name)


def _teacher(teacher: TeacherConfig, ablation: Ablation, *, cached: bool) -> dict[str, Any]:
    if not cached:
        return teacher.model_dump(exclude_unset=True)
    ref = StageRef(cache_name(ablation), teacher.name)
    return {"name": teacher.name, "model": str(ref), "backend": "cached"}


def _fewer(value: Any, names: Sequence[str], kept: Sequence[str], where: str) -> Any:
    """An option of the weighting for fewer teachers: a mapping from their names loses those that are left out."""
    if isinstance(value, Mapping) and value and set(value) <= set(names):
        return {name: inner for name, inner in value.items() if name in kept}
    per_teacher = isinstance(value, list | tuple) and len(value) == len(names)
    if per_teacher or (isinstance(value, str) and value in names):
        raise ValueError(
            f"{where}: {WHERE} cannot tell what is left of {value!r} without a teacher; give a mapping from the "
            "teachers' names"
        )
    return value


def _stage(values: Mapping[str, Any], name: str) -> StageConfig:
    try:
        return StageConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first.get("ctx", {}).get("error", first["msg"])
        raise ValueError(f"{WHERE}: stage {name!r}: {reason}") from None


def _scored(evaluate: EvaluateConfig, ablation: Ablation, students: Sequence[str]) -> EvaluateConfig:
    """The evaluation with the students scored, and each compared with the stage's own."""
    pairs = [Comparison(candidate=ablation.stage, baseline=name) for name in students]
    changes: dict[str, object] = {
        "comparisons": (*evaluate.comparisons, *(pair for pair in pairs if pair not in evaluate.comparisons))
    }
    if evaluate.stages:
        more = [name for name in (ablation.stage, *students) if name not in evaluate.stages]
        changes["stages"] = (*evaluate.stages, *more)
    return evaluate.model_copy(update=changes)
