"""Where the models and the tokenizer of a run come from, before any of them is loaded."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from mtkd.chain import stage_of
from mtkd.config import RunConfig
from mtkd.data.tokenizers import load_tokenizer
from mtkd.errors import UserError
from mtkd.models.cards import load_cards
from mtkd.models.folder import check_folder


def resolve_path(path: str, base: Path) -> Path | str:
    """A model or tokenizer folder (relative to `base` or to the working directory), a card's source, or a hub id."""
    for candidate in (base / path, Path(path)):
        if candidate.is_dir():
            return candidate
    card = load_cards().get(path)
    return card.source if card else path


def given_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run that does not train one: the given one, or that of the first loaded model."""
    settings = config.tokenizer
    if settings is not None and settings.path is not None:
        return read_tokenizer(resolve_path(settings.path, config.base))
    for stage in config.stages.values():
        live = [t.model for t in stage.teachers if t.backend != "cached"]
        for model in (*live, *stage.trained.values()):
            if model.path is not None and stage_of(model.path) is None:
                return read_tokenizer(resolve_path(model.path, config.base), model.revision)
    raise UserError("no model brings a tokenizer", where="tokenizer", todo="set tokenizer.path or tokenizer.train_on")


def read_tokenizer(folder: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; a folder is checked before any file of it is opened."""
    if isinstance(folder, Path):
        check_folder(folder, weights=False)
    return load_tokenizer(str(folder), revision)
