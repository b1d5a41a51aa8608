"""GLM's blank infilling: which spans of a text are hidden."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from mtkd.config.base import Config, Share


class InfillConfig(Config):
    """GLM's blank infilling, as GLM-10B was trained; of the first three, those left out next to others are 0."""

    mask: Share = Field(
        0.5, description="[MASK]: spans of a few tokens; base and large know these alone: {mask: 1, block_mask: 0}"
    )
    smask: Share = Field(0.3, description="[sMASK]: whole sentences")
    gmask: Share = Field(0.2, description="[gMASK]: one long span, anywhere or up to the end of the text")
    span: Annotated[float, Field(ge=1e-9, le=1000)] = Field(
        3.0, description="[MASK]: mean of the Poisson law of span lengths in tokens, before its zeros are left out"
    )
    min_ratio: Share = Field(
        0.25, description="[gMASK]: least share of the text in the long span; the longest is all of it (paper: 0.5)"
    )
    anywhere: Share = Field(
        0.5, description="[gMASK]: share whose span may stand anywhere; the others' goes on to the end of the text"
    )
    block_mask: Share = Field(
        0.1,
        description="[MASK]: share of a span's tokens that [dBLOCK] hides from those after them, once predicted "
        "themselves",
    )

    @model_validator(mode="before")
    @classmethod
    def _others_are_zero(cls, value: Any) -> Any:
        shares = ("mask", "smask", "gmask")
        if isinstance(value, dict) and any(name in value for name in shares):
            return {**dict.fromkeys(shares, 0.0), **value}
        return value

    @model_validator(mode="after")
    def _sum(self) -> InfillConfig:
        if abs(self.mask + self.smask + self.gmask - 1) > 1e-6:
            raise ValueError(f"mask, smask and gmask sum to {self.mask + self.smask + self.gmask:g}, not to 1")
        return self
