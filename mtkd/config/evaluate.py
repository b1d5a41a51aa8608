"""Describe the evaluation: scores of the finished models and tests of their differences."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mtkd.config.answers import AnswersConfig
from mtkd.config.base import Config, Length
from mtkd.config.stage import ScoringBatchConfig


class Comparison(Config):
    """Two models, or the ensemble of a stage's teachers, compared per document with a paired test."""

    candidate: str = Field(
        description="stage name, NAME/MEMBER, or ensemble:STAGE for the uniform ensemble of its teachers"
    )
    baseline: str = Field(description="the same")


class Ablation(Config):
    """What each teacher was worth: the student trained once more per teacher left out, or alone; `teachers` for short.

    The stages are `STAGE-without-TEACHER` and `STAGE-alone-TEACHER`, with the stage's own seed, steps and data. Each is
    scored and compared with STAGE.
    """

    stage: str = Field("", description="distill stage with several teachers; default: the last one")
    teachers: Literal["without", "alone", "both"] = Field(
        "without", description="students of all teachers but one, of one alone, or both kinds"
    )
    cache: bool | None = Field(
        None,
        description="true: the further students read the teachers from one cache stage (STAGE-teachers) of class "
        "logits; false: teachers run live; default: a cache wherever one serves the stage",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        if value == "teachers":
            return {}
        if not isinstance(value, dict | Ablation):
            raise ValueError("ablate is `teachers`, or a block such as {stage: NAME, teachers: alone}")
        return value


class EvaluateConfig(Config):
    """The scores at the end of a run, and the differences that are tested."""

    data: str = Field("", description="name of a `data` entry; may be left out when there is only one")
    split: Literal["validation", "test"] = Field("test", description="split that is scored")
    stages: tuple[str, ...] = Field(
        (), description="stages (or NAME/MEMBER) scored; default: all whose models can do the task of `data`"
    )
    ensembles: tuple[str, ...] = Field(
        (), description="stages whose teachers are also scored as a uniform mixture of probabilities"
    )
    comparisons: tuple[Comparison, ...] = Field(
        (), description="paired tests; their p-values are Holm-corrected together"
    )
    answers: AnswersConfig | None = Field(
        None, description="causal-lm: have the models answer held-out prompts, and compare the texts with the data's"
    )
    ablate: Ablation | None = Field(
        None, description="teachers: train the student without each of its teachers too, and compare"
    )
    batch: ScoringBatchConfig = Field(ScoringBatchConfig(sequences=32), description="batch size of scoring")
    resamples: Length = Field(10_000, description="bootstrap and permutation resamples")
    agreement: bool = Field(
        True, description="say at the start of a stage of several teachers how often they make the same choice"
    )
    confidence: Annotated[float, Field(gt=0, lt=1)] = Field(0.95, description="level of the confidence intervals")

    def enough_resamples(self, rows: int) -> int:
        """`resamples`, or more where a verdict needs them: no p is below 1 / (resamples + 1), and Holm multiplies it.

        With 4 rows / (1 - confidence) resamples, Holm corrects the smallest p to a quarter of the level.

        Args:
            rows: comparisons in the family, those of domains too.
        """
        return max(self.resamples, math.ceil(4 * rows / (1 - self.confidence) - 1e-9))
