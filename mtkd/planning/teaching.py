"""Find the teachers' heads that a stage reads."""

from __future__ import annotations

from mtkd.config import RunConfig
from mtkd.methods.rows import stage_rows
from mtkd.registry import TASKS
from mtkd.weightings.make import stage_reads

HEADS = ("logits", "nsp_logits")
"""Features that come from a head."""


def heads_read(config: RunConfig, name: str) -> frozenset[str]:
    """The `HEADS` of the teachers that rows, weighting, cache or the score of the ensemble read."""
    stage, where = config.stages[name], f"stages.{name}"
    data = config.data_of(stage)
    rows = stage_rows(stage, data, where)
    heads = {row.feature for row in rows if row.target == "teacher" and row.feature in HEADS and row.weight}
    reads = stage_reads(stage, where, token_level=TASKS.find(data.task).token_level)
    weighed = bool(stage.teachers) and reads.predictions
    if weighed or not stage.trained or name in config.evaluate.ensembles:
        heads.add("logits")
    return frozenset(heads)
