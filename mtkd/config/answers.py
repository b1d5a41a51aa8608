"""Describe the evaluation of text: answers that models write to held-out prompts, and how they are scored."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, model_validator

from mtkd.config.base import Config, Length, Natural, NotNegative
from mtkd.config.rollout import GreedyConfig

EXTRACTORS = ("whole", "last_number", "first_word")
"""What is compared of an answer, without options."""


class Extract(Config):
    """The part of an answer that is compared: of what the model wrote, and of the data's answer alike."""

    name: str = Field(
        "",
        description="whole: the text without white space around it; last_number: 1,234.50 is 1234.5; first_word: "
        "in small letters; with path: the name of a function",
    )
    pattern: str | None = Field(None, description="regular expression with one group; that of its last match")
    path: str | None = Field(
        None,
        description="Python file with the function: text -> what is compared, or None; relative to this file",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Extract:
        if self.pattern is not None:
            if self.name or self.path:
                raise ValueError("pattern stands alone: drop name and path")
            try:
                groups = re.compile(self.pattern).groups
            except re.error as error:
                raise ValueError(f"pattern is no regular expression of Python: {error}") from None
            if groups != 1:
                raise ValueError(
                    f"pattern has {groups} groups: put what is compared in one (...), and others in (?:...)"
                )
        elif self.path is not None:
            if not self.path or not self.name.isidentifier():
                raise ValueError("path is a Python file, and name that of a function in it")
        elif self.name not in EXTRACTORS:
            raise ValueError(
                f"{self.name!r} is none of {', '.join(EXTRACTORS)}; or give pattern: REGEX, or path and name of a "
                "function"
            )
        return self


class AnswersConfig(GreedyConfig):
    """Answers that every scored model, and every teacher from elsewhere, writes to held-out prompts."""

    data: str = Field("", description="name of a `data` entry with prompts; default: that of evaluate")
    split: Literal["validation", "test"] | None = Field(None, description="default: that of evaluate")
    temperature: NotNegative = Field(
        0.0, le=1e6, description="0: the most probable token; else draws, the same in every run with this seed"
    )
    examples: Length = Field(200, description="prompts that are answered at most, evenly spread over the split")
    extract: Extract = Field(
        Extract(name="whole"),
        description="exact_match compares this: whole, last_number, first_word, {pattern: REGEX}, or "
        "{path: FILE, name: FUNCTION}",
    )
    metrics: tuple[Literal["exact_match", "rouge_l"], ...] = Field(
        ("exact_match",), description="against the data's answer; rouge_l is ROUGE-L (F1), of the library rouge-score"
    )
    samples: Natural = Field(4, le=100, description="prompts whose answers stand in log and report")

    @model_validator(mode="after")
    def _once(self) -> AnswersConfig:
        if len(set(self.metrics)) < len(self.metrics):
            raise ValueError("metrics names one twice")
        if "extract" in self.model_fields_set and "exact_match" not in self.metrics:
            raise ValueError("extract is for exact_match, which is not among metrics: drop it")
        return self
