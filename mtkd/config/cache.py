"""What a cache stage writes of its teachers' outputs, so that later stages read them instead of running a teacher."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator

from mtkd.config.base import Config, Positive

# Features beside the logits that a cache may hold: attention maps would be larger than the model that makes them.
_KEY = re.compile(r"(hidden|cls)\.(0|[1-9][0-9]*)|embedding")


class CacheConfig(Config):
    """The content of a teacher cache. Classification: every class logit is kept, so `targets` and `k` are not read."""

    targets: Literal["top", "sampled"] = Field(
        "top",
        description="token tasks: top = the k most probable ids of every target position with the mass of the others; "
        "sampled = k ids drawn from the teacher's distribution, an unbiased estimate of its cross entropy",
    )
    k: Positive = Field(50, description="token tasks: ids kept, or drawn, per position; at most the vocabulary")
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        1.0, description="token tasks: of the softmax that is kept; rows that read the cache must have the same"
    )
    hidden: tuple[str, ...] = Field(
        (), description="hidden states kept whole, by feature key: hidden.4, cls.2, embedding; what rows will read"
    )
    ce: bool = Field(
        False, description="token tasks: also keep the exact cross entropy with each label, for weightings that read it"
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="of hidden states and class logits on disk"
    )
    shard_examples: Positive = Field(
        1024, description="examples per file: what a killed run loses at most, and what one process takes at a time"
    )

    @field_validator("hidden")
    @classmethod
    def _keys(cls, hidden: tuple[str, ...]) -> tuple[str, ...]:
        for key in hidden:
            if not _KEY.fullmatch(key):
                raise ValueError(f"{key!r} is not kept in a cache; keys are hidden.K and cls.K (K a layer), embedding")
        if len(set(hidden)) < len(hidden):
            raise ValueError("a key stands twice")
        return hidden
