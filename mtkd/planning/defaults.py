"""The weighting of a stage that names none."""

from __future__ import annotations

from pathlib import Path

from mtkd.config import ModelConfig, Named, RunConfig, StageConfig
from mtkd.config.teacher import CacheTeacher
from mtkd.errors import UserError
from mtkd.methods.rows import stage_rows
from mtkd.models.folder import MAP_FILE
from mtkd.planning.locate import resolve_path
from mtkd.pool.cache.folder import read_facts
from mtkd.registry import TASKS

POSTERIOR = Named(name="posterior")
_READS = "token_log_probs"


def with_weightings(config: RunConfig) -> RunConfig:
    """The run in which stages with a weight per token and no `weighting` have the posterior, where it is defined.

    It needs no labels, and beats uniform weights and the best single teacher where teachers differ
    (benchmarks/README.md, language models); where they agree its weights are uniform. All other stages keep uniform
    weights: those of the student's own text too, for which it is not measured.
    """
    chosen = {name: stage for name, stage in config.stages.items() if _fits(config, name, stage)}
    if not chosen:
        return config
    return config.model_copy(update={"stages": config.stages | {n: _with_posterior(s) for n, s in chosen.items()}})


def chosen_for(stage: StageConfig) -> bool:
    """Whether the weighting of a stage is the posterior without having been asked for."""
    return stage.weighting == POSTERIOR and "weighting" not in stage.model_fields_set


def _with_posterior(stage: StageConfig) -> StageConfig:
    chosen = stage.model_copy(update={"weighting": POSTERIOR})
    chosen.model_fields_set.discard("weighting")  # the user has set none: `chosen_for` can tell
    return chosen


def _fits(config: RunConfig, name: str, stage: StageConfig) -> bool:
    if "weighting" in stage.model_fields_set or stage.per != "token" or len(stage.teachers) < 2:
        return False
    data, where = config.data_of(stage), f"stages.{name}"
    task = TASKS.find(data.task)
    written = stage.rollout is not None and stage.rollout.share
    if written or not task.left_to_right or _compressed(config, stage.student):
        return False
    compared = [row for row in stage_rows(stage, data, where) if row.feature == "logits" and row.target != "labels"]
    cached = [teacher for teacher in stage.teachers if isinstance(teacher, CacheTeacher)]
    return bool(compared) and all(_knows(config, teacher, task.auto_class) for teacher in cached)


def _compressed(config: RunConfig, student: ModelConfig | None) -> bool:
    """Whether the student keeps a part of the ids: teachers are then read at these alone."""
    if student is None or student.vocabulary is not None:
        return student is not None
    if student.stage is None:
        return student.path is not None and (Path(resolve_path(student.path, config.base)) / MAP_FILE).exists()
    earlier = config.stages[student.stage.stage]
    return _compressed(config, earlier.members.get(student.stage.part, earlier.student))


def _knows(config: RunConfig, teacher: CacheTeacher, auto_class: str) -> bool:
    """Whether a cache has the teacher's log-probabilities of all tokens, and of the teacher as it is read here."""
    if teacher.calibrate is not None:
        return False
    if teacher.model.stage is not None:
        return _READS in config.stages[teacher.model.stage.stage].cache.traits
    try:
        facts = read_facts(str(teacher.model.path), config.base, auto_class, "")
        return _READS in facts.content.known_traits()
    except UserError:
        return False  # what is wrong with the cache is said where it is read
