"""Describe what a student writes while it is trained: how much of the data, how it draws, how long it uses it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mtkd.config.base import Config, Length, Natural, NotNegative, Positive, Share, Temperature


class SamplingConfig(Config):
    """How a model writes: the distribution that a token is drawn from, and where a text ends."""

    max_new_tokens: Length = Field(
        description="most tokens of a completion, the end token included; a row stays within data.NAME.max_length"
    )
    temperature: Temperature = Field(1.0, description="logits are divided by it before the softmax")
    top_p: Share = Field(1.0, description="draw from the fewest most probable tokens with this mass; 1 = all")
    top_k: Natural = Field(0, description="draw from the k most probable tokens; 0 = all")
    stop: tuple[str, ...] = Field(
        (), description="tokens that end a text too, in addition to the tokenizer's end token; each is one token"
    )

    @field_validator("top_p")
    @classmethod
    def _some_mass(cls, top_p: float) -> float:
        if top_p == 0:
            raise ValueError("no token would be left to draw; top_k: 1 takes the most probable one")
        return top_p

    @field_validator("stop")
    @classmethod
    def _distinct(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if "" in stop or len(set(stop)) < len(stop):
            raise ValueError("an empty text, or one that stands twice")
        return stop


class GreedyConfig(SamplingConfig):
    """How a model writes that may also take the most probable token each time."""

    temperature: NotNegative = Field(1.0, le=1e6, description="0: the most probable token")

    @field_validator("temperature")
    @classmethod
    def _none_or_enough(cls, temperature: float) -> float:
        if 0 < temperature < 1e-3:
            raise ValueError("0, or at least 0.001")
        return temperature


class RolloutConfig(SamplingConfig):
    """The part of an optimizer step's examples whose answers the student writes itself."""

    share: Share = Field(
        1.0,
        description="part of a step's examples that the student answers itself, drawn once for all processes; the rest "
        "keep the data's answers, and label rows count there alone; 0 = none",
    )
    per_prompt: Positive = Field(1, le=1024, description="completions of one prompt, each a row of the batch")
    reuse: Positive = Field(1, le=1024, description="optimizer steps that learn from a written batch before the next")
    engine: Literal["transformers"] = Field("transformers", description="who writes: the student, in this process")
