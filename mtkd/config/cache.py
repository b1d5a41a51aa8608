"""What a cache stage writes of its teachers' outputs, so that later stages read them instead of running a teacher."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mtkd.config.base import Config, Positive, Temperature, Width

Trait = Literal["ce", "entropy", "confidence", "margin", "choice", "energy", "token_log_probs"]
Dtype = Literal["float16", "bfloat16", "float32"]

# Features that a cache may hold in addition to logits. Attention maps would be larger than the model that makes them.
_KEY = re.compile(r"(hidden|cls)\.(0|[1-9][0-9]*)|embedding")


class CacheConfig(Config):
    """The content of teacher caches. Of classes all logits are kept: only `hidden`, `dtype`, shards are read."""

    targets: Literal["top", "sampled"] = Field(
        "top",
        description="token tasks: top = the k most probable ids of every target position with the mass of the others; "
        "sampled = k ids drawn from the teacher's distribution, an unbiased estimate of its cross entropy",
    )
    k: Width = Field(50, description="token tasks: ids kept, or draws, per position; top: at most the vocabulary")
    temperature: Temperature = Field(
        1.0, description="token tasks: of the softmax that is kept; rows that read the cache must have the same"
    )
    bits: Annotated[int, Field(ge=4, le=12)] = Field(6, description="top: bits per kept log-probability")
    proposal: Temperature = Field(
        1.0, description="sampled: draws come from the softmax at temperature x proposal, with importance weights"
    )
    traits: tuple[Trait, ...] = Field(
        (),
        description="token tasks: facts per position kept exactly (4 bytes each), for weightings that read them; "
        "token_log_probs (causal-lm): of every token, prompts included",
    )
    hidden: tuple[str, ...] = Field(
        (), description="hidden states kept whole, by feature key: hidden.4, cls.2, embedding; what rows will read"
    )
    dtype: Dtype = Field("float16", description="of hidden states on disk")
    shard_examples: Positive = Field(
        1024, description="examples per file: what a killed run loses at most, and what one process takes at a time"
    )

    @model_validator(mode="after")
    def _every_knob_is_read(self) -> CacheConfig:
        for name, reader in (("bits", "top"), ("proposal", "sampled")):
            if name in self.model_fields_set and self.targets != reader:
                raise ValueError(f"{name} is for targets: {reader}")
        return self

    @field_validator("hidden")
    @classmethod
    def _keys(cls, hidden: tuple[str, ...]) -> tuple[str, ...]:
        for key in hidden:
            if not _KEY.fullmatch(key):
                raise ValueError(f"{key!r} is not kept in a cache; keys are hidden.K and cls.K (K a layer), embedding")
        if len(set(hidden)) < len(hidden):
            raise ValueError("a key stands twice")
        return hidden
