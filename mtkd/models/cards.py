"""Teacher cards: one YAML file of facts per published model, in the folder `teachers`."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, computed_field

from mtkd.config import Config, Name, Positive
from mtkd.config.cache import Dtype
from mtkd.config.yamlfile import parse, read_text
from mtkd.errors import DataError, UserError
from mtkd.models.info import GLM

_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Card(Config):
    """Facts about a published model, enough to plan a run before anything is downloaded."""

    name: Name = Field(description="the name of the file, usable as a model's `path`")
    source: str = Field(description="hub id, or the URL of a checkpoint that must be fetched by hand")
    revision: str | None = Field(None, description="hub: branch, tag or commit; default: main")
    architecture: str = Field(description="transformers' model_type, or mtkd's own")
    tokenizer: str = Field(description="what kind, and hub id where it is another model's")
    vocabulary: Positive = Field(description="rows of the embedding, padding included")
    ids: Positive | None = Field(None, description="GLM: ids of its tokenizer, commands included")
    positions: Positive | None = Field(None, description="GLM: longest text in tokens")
    layers: Positive = Field(description="number of layers")
    width: Positive = Field(description="width of the hidden states")
    heads: Positive = Field(description="attention heads (of the queries)")
    parameters: Annotated[int, Field(gt=0, le=10**15)] = Field(
        description="number of parameters: encoders without a task head (with pooler), decoders with their output "
        "head; tied ones once"
    )
    predicts: Literal["next tokens", "masked tokens", "nothing"] = Field(
        description="what the heads in its published files were trained for; none of these models predicts classes"
    )
    dtype: Dtype = Field(description="of the published weights")
    licence: str = Field(description="of the weights, as the publisher states it")
    homepage: str = Field(description="URL of the model page or repository")
    paper: str = Field(description="URL")

    @computed_field(description="memory of the weights alone in 10^9 bytes: parameters x bytes of the published dtype")
    def memory_gb(self) -> float:
        return round(self.parameters * _BYTES[self.dtype] / 1e9, 2)

    @property
    def teaches(self) -> str:
        """What a stage may read of it as it is published."""
        inside = "hidden states, attention"
        first = {"next tokens": "causal-lm, ", "masked tokens": "masked-lm, ", "nothing": ""}[self.predicts]
        return f"{first}{inside}; classes after kind: finetune"


def missing_glm(path: str | None, resolve: Callable[[str], Path | str]) -> Card | None:
    """The card of a GLM that is not here: its weights cannot be fetched by themselves, they must be converted.

    Args:
        path: of a model or tokenizer.
        resolve: maps names of folders to folders, as in `find_folder`.
    """
    card = load_cards().get(path or "")
    return card if card is not None and card.architecture == GLM and not Path(resolve(card.name)).is_dir() else None


def how_to_get(card: Card) -> str:
    """What brings the weights of a published GLM to where `missing_glm` looks for them."""
    return (
        f"download {card.source}, then `mtkd convert-glm FOLDER {card.name}` (with --vocabulary where the "
        f"plain vocabulary is not in the folder of the weights); the folder '{card.name}' is looked for next to the "
        "configuration and in the working directory"
    )


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
            card = Card.model_validate(parse(read_text(file), str(file)).plain())
        except (ValidationError, UserError) as error:
            raise DataError(f"the teacher card is not valid: {error}", where=str(file)) from error
        if card.name != file.stem:
            raise DataError("a card has the name of its file", where=str(file), found=card.name, allowed=file.stem)
        cards[card.name] = card
    return cards
