"""Define the base of all configuration blocks: immutable, without unknown keys, with safe names and bounds."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def check_name(name: str) -> str:
    """A name that is safe as a folder: no separators, no leading '-' or '.', no '..', at most 100 characters."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            "a name has 1 to 100 characters A-Z a-z 0-9 _ . + -, starts with a letter, digit or _, has no '..'"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _no_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a number, not true or false")  # a bool is an int in Python, not here
    return value


# Every number has bounds: far above any sensible training, and below values that overflow, never end or fill memory.
_Number = BeforeValidator(_no_bool)
LARGEST = 1e38
"""The largest real number: float32, in which all training is done, ends little above it."""

Positive = Annotated[int, Field(gt=0, le=1_000_000_000), _Number]
Natural = Annotated[int, Field(ge=0, le=1_000_000_000), _Number]
Share = Annotated[float, Field(ge=0, le=1), _Number]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST), _Number]
Rate = Annotated[float, Field(ge=1e-30, le=LARGEST), _Number]
Decay = Annotated[float, Field(ge=0, lt=1), _Number]
Temperature = Annotated[float, Field(ge=1e-3, le=1e6), _Number]
Epochs = Annotated[float, Field(gt=0, le=1e6), _Number]
Gigabytes = Annotated[float, Field(gt=0, le=1e9), _Number]
Weight = Annotated[float, Field(gt=0, le=1e6), _Number]
Seed = Annotated[int, Field(ge=0, lt=2**32), _Number]
Layers = Annotated[int, Field(gt=0, le=256), _Number]
Width = Annotated[int, Field(gt=0, le=1_000_000), _Number]
Length = Annotated[int, Field(gt=0, le=10_000_000), _Number]
Processes = Annotated[int, Field(gt=0, le=4096), _Number]


class Config(BaseModel):
    """Base of every block: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class Named(Config):
    """A registered thing and its options; a plain string means no options."""

    name: str = Field(description="registered name; see `mtkd ls`")
    options: dict[str, Any] = Field(default_factory=dict, description="checked against its keyword parameters")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
