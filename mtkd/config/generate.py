"""Describe a stage of `kind: generate`: who writes, how, and which of the texts are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mtkd.config.answers import Extract
from mtkd.config.base import Config, Natural, Positive
from mtkd.config.rollout import GreedyConfig


class KeepConfig(Config):
    """Which of a prompt's texts are kept; texts without an end, blank ones and doubles never are."""

    by: Literal["none", "agreement", "answer", "length"] = Field(
        "none",
        description="agreement: those first that all other teachers find most probable (mean log-probability per "
        "token); answer: only those whose extract is that of the data's answer; length: the shortest first",
    )
    best: Natural = Field(0, description="texts per prompt; 0 = all")
    extract: Extract | None = Field(None, description="by answer: what is compared, as in evaluate.answers")

    @model_validator(mode="after")
    def _together(self) -> KeepConfig:
        if (self.extract is not None) != (self.by == "answer"):
            raise ValueError("by: answer and extract, what is compared, go together")
        return self


class GenerateConfig(GreedyConfig):
    """Texts that the teachers of a stage write to the prompts of its train split; all teachers score them."""

    writers: tuple[str, ...] = Field((), description="names of teachers that write; default: all")
    ensemble: bool = Field(False, description="the writers write together: tokens of the mean of their probabilities")
    per_prompt: Positive = Field(1, le=1024, description="texts of one prompt, by each writer")
    keep: KeepConfig = Field(KeepConfig(), description="which of the texts are kept")

    @model_validator(mode="after")
    def _differ(self) -> GenerateConfig:
        if self.temperature == 0 and self.per_prompt > 1:
            raise ValueError("at temperature 0 all texts of a prompt are the same: set per_prompt: 1")
        if len(set(self.writers)) < len(self.writers):
            raise ValueError("writers names one twice")
        return self
