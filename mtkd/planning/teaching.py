"""What a stage reads of its teachers' predictions."""

from __future__ import annotations

from mtkd.config import RunConfig
from mtkd.methods.rows import stage_rows

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
