"""How a teacher is calibrated: its logits divided by a temperature of its own before anything reads them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from mtkd.config.base import Config, Positive, Temperature

FIT = "fit"


class CalibrateConfig(Config):
    """A temperature of the teacher's own; `calibrate: true` fits it, `calibrate: 0.4` gives it."""

    temperature: Literal["fit"] | Temperature = Field(
        "fit",
        description="number that the teacher's logits are divided by; fit: the one that makes labels most probable",
    )
    bias: bool = Field(
        False, description="fit, classes: also add a number per class, for a teacher that names some classes too often"
    )
    split: Literal["validation", "train", "test"] = Field(
        "validation", description="fit: where the labels are; train only if the teacher was not trained on it"
    )
    data: str = Field(
        "", description="fit: another `data` entry with such labels, of the same task and classes; default: the stage's"
    )
    examples: Positive = Field(1000, description="fit: at most so many labelled texts, spread over the split")

    @property
    def fits(self) -> bool:
        """Whether the temperature is fitted on labels."""
        return self.temperature == FIT

    @field_validator("temperature", mode="before")
    @classmethod
    def _number_or_word(cls, value: Any) -> Any:
        if value == FIT:
            return value
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if not 1e-3 <= number <= 1e6:
            raise ValueError(f"a temperature is a number from 0.001 to 1,000,000, or {FIT}")
        return number

    @model_validator(mode="after")
    def _fit_alone_reads_labels(self) -> CalibrateConfig:
        if not self.fits and (unread := sorted(self.model_fields_set - {"temperature"})):
            raise ValueError(f"{unread[0]} is for temperature: fit; a number needs no labels: drop it")
        return self


def calibrate_block(value: Any) -> Any:
    """A block from its short forms: true fits, false is none, a number is the temperature."""
    if isinstance(value, bool):
        return {} if value else None
    if isinstance(value, int | float | str):
        return {"temperature": value}
    if value is None or isinstance(value, dict | CalibrateConfig):
        return value
    raise ValueError("calibrate is true, a number, or a block of options")
