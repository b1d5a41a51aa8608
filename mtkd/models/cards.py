"""Teacher cards: one YAML file of facts per published model, in the folder `teachers`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, computed_field

from mtkd.config import Config, Name, Positive
from mtkd.errors import DataError

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Card(Config):
    """Facts about a published model, enough to plan a run before anything is downloaded."""

    name: Name = Field(description="the name of the file, usable as a model's `path`")
    source: str = Field(description="hub id, or the URL of a checkpoint that must be fetched by hand")
    revision: str | None = Field(None, description="hub: branch, tag or commit; default: main")
    architecture: str = Field(description="transformers' model_type, or mtkd's own")
    tokenizer: str = Field(description="what kind, and hub id where it is another model's")
    vocabulary: Positive = Field(description="rows of the embedding, padding included")
    layers: Positive = Field(description="number of layers")
    width: Positive = Field(description="width of the hidden states")
    heads: Positive = Field(description="attention heads (of the queries)")
    parameters: Positive = Field(
        description="number of parameters: encoders without a task head (with pooler), decoders with their output "
        "head; tied ones once"
    )
    dtype: Literal["float32", "float16", "bfloat16"] = Field(description="of the published weights")
    licence: str = Field(description="of the weights, as the publisher states it")
    homepage: str = Field(description="URL of the model page or repository")
    paper: str = Field(description="URL")

    @computed_field(description="memory of the weights alone in 10^9 bytes: parameters x bytes of the published dtype")
    def memory_gb(self) -> float:
        return round(self.parameters * _BYTES[self.dtype] / 1e9, 2)


def load_cards() -> dict[str, Card]:
    """Every card by name, sorted.

    Raises:
        DataError: a card that does not validate, or whose name is not that of its file.
    """
    return dict(_read(_folder()))


def _folder() -> Path:
    packaged = Path(__file__).parents[1] / "teachers"  # inside an installed wheel
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "teachers"  # a checkout


@cache
def _read(folder: Path) -> dict[str, Card]:
    cards = {}
    for file in sorted(folder.glob("*.yaml")):
        try:
            card = Card.model_validate(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (ValidationError, yaml.YAMLError) as error:
            raise DataError(f"the teacher card is not valid: {error}", where=str(file)) from error
        if card.name != file.stem:
            raise DataError("a card has the name of its file", where=str(file), found=card.name, allowed=file.stem)
        cards[card.name] = card
    return cards
