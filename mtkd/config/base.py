"""What every block of the configuration is built on: immutable, no unknown keys, safe names."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

STAGE_PREFIX = "stage:"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,99}")


def check_name(name: str) -> str:
    """A name that is safe as a folder: no separators, no leading '-' or '.', no '..', at most 100 characters."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(
            "a name has 1 to 100 characters A-Z a-z 0-9 _ . + -, starts with a letter, digit or _, has no '..'"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]
Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of every block: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Named(Config):
    """A registered thing and its options; a plain string means no options."""

    name: str = Field(description="registered name; see `mtkd ls`")
    options: dict[str, Any] = Field(default_factory=dict, description="checked against its keyword parameters")

    @model_validator(mode="before")
    @classmethod
    def _from_string(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value
