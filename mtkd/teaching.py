"""What a stage reads of its teachers' predictions, and whether a stage's own model ever learns to predict."""

from __future__ import annotations

from mtkd.chain import model_name, model_of, stage_of
from mtkd.config import RunConfig, StageConfig
from mtkd.mix import stage_rows

BLIND = ("uniform", "fixed", "drop", "route")
"""Weightings that look at no prediction."""

HEADS = ("logits", "nsp_logits")
"""Features that come from a head."""


def heads_read(config: RunConfig, name: str) -> frozenset[str]:
    """Which of `HEADS` a stage reads of its teachers: rows, weighting, cache, or the score of the ensemble."""
    stage = config.stages[name]
    rows = stage_rows(stage, config.data[config.data_name(stage.data)], f"stages.{name}")
    found = {row.feature for row in rows if row.target == "teacher" and row.feature in HEADS and row.weight}
    # a plug-in's weighting is taken to look: what it reads is known when it runs
    looks = bool(stage.teachers) and stage.weighting.name not in BLIND
    if looks or stage.kind == "cache" or name in config.evaluate.ensembles:
        found.add("logits")
    return frozenset(found)


def learns_to_predict(config: RunConfig, name: str) -> bool:
    """Whether a stage trains its models' heads: some row compares logits."""
    stage = config.stages[name]
    rows = stage_rows(stage, config.data[config.data_name(stage.data)], f"stages.{name}")
    return any(row.feature == "logits" and row.weight for row in rows)


def never_trained(config: RunConfig, model: str) -> bool:
    """Whether a stage's model has the head that it was drawn with: from its first stage on, no row compares logits.

    A model that is loaded from a folder may bring its head along; the plan looks.

    Args: model: STAGE or STAGE/MEMBER.
    """
    name = model.partition("/")[0]
    stage: StageConfig = config.stages[name]
    if stage.kind == "cache" or learns_to_predict(config, name):
        return False
    origins = {model_name(name, stage, role): made for role, made in stage.trained.items()}
    path = origins[model].path
    earlier = model_of(path)
    return path is None if earlier is None or stage_of(path) is None else never_trained(config, earlier)
