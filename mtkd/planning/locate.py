"""Locate the models and the tokenizer of a run, and train the tokenizer where the run has its own."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtkd.config import ModelConfig, RunConfig
from mtkd.data.chat_templates import find_template, give_template
from mtkd.data.progress import Working, say
from mtkd.data.raw import Raw
from mtkd.data.segmentation import check_certain
from mtkd.data.tokenizers import check_same_tokenizer, load_tokenizer, train_tokenizer
from mtkd.data.turns import contents
from mtkd.engine.dist import Dist
from mtkd.engine.manifest import MANIFEST, check_seal
from mtkd.engine.record import read_object
from mtkd.engine.seal import write_sealed
from mtkd.errors import DataError, UserError
from mtkd.models.cards import Card, how_to_get, load_cards, missing_glm
from mtkd.models.folder import PACKAGE_PREFIX, check_tokenizer_folder, has_tokenizer, package_folder
from mtkd.planning.exports import SMALL, check_foreign
from mtkd.pool import BACKENDS

_ORIGIN, _ORIGIN_FILE = "trained_on", "trained_on.json"


def resolve_path(path: str, base: Path) -> Path | str:
    """A model or tokenizer folder (of a package, or below `base` or the working directory), a card's source or an id.

    Raises:
        UserError: a package that is not installed, or has no such folder.
        DataError: the folder is of a run, and its small files are not what that run sealed.
    """
    if path.startswith(PACKAGE_PREFIX):
        return package_folder(path)
    for candidate in (base / path, Path(path)):
        if candidate.is_dir():
            check_foreign(candidate, SMALL)
            return candidate
    card = load_cards().get(path)
    return card.source if card else path


def revision_of(model: ModelConfig) -> str | None:
    """The hub revision to load: that of the configuration, else that of the card."""
    card = load_cards().get(model.path or "")
    return model.revision or (card.revision if card else None)


def tokenizer_origin(config: RunConfig) -> tuple[str, str | None]:
    """Path and revision of the tokenizer of a run that trains none: the configured one, or the first loaded model's.

    Raises:
        UserError: there is none.
    """
    settings = config.tokenizer
    if settings is not None and settings.path is not None:
        return settings.path, None
    for stage in config.stages.values():
        live = [t.model for t in stage.teachers if BACKENDS[t.backend].runs]
        for model in (*live, *stage.trained.values()):
            if model.path is not None and model.stage is None:
                folder = resolve_path(model.path, config.base)
                if not isinstance(folder, Path) or has_tokenizer(folder):
                    return model.path, revision_of(model)
    raise UserError("no model brings a tokenizer", where="tokenizer", todo="set tokenizer.path or tokenizer.train_on")


def given_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of a run that does not train one."""
    path, revision = tokenizer_origin(config)
    if (card := missing(path, config.base)) is not None:
        raise UserError("this model is not here", where="tokenizer", found=path, todo=how_to_get(card))
    tokenizer = read_tokenizer(resolve_path(path, config.base), revision)
    if tokenizer is None:
        raise DataError(
            "the folder holds no tokenizer",
            where="tokenizer.path",
            found=path,
            allowed="a folder with tokenizer.json or another tokenizer's files, or a hub id",
            todo="name a folder with a tokenizer, or train one: tokenizer.train_on",
        )
    check_certain(tokenizer, "tokenizer")
    settings = config.tokenizer
    if settings is not None and settings.chat_template is not None:
        give_template(tokenizer, find_template(settings.chat_template, config.base), trained=False)
    return tokenizer


def missing(path: str | None, base: Path) -> Card | None:
    """The card of a published GLM that is not converted yet, so that only its shape is known."""
    return missing_glm(path, lambda name: resolve_path(name, base))


def missing_models(config: RunConfig) -> list[str]:
    """The models and the tokenizer of a run that are not here, each with the way to get it."""
    models = [m for s in config.stages.values() for m in (*s.trained.values(), *(t.model for t in s.teachers))]
    paths = [model.path for model in models] + ([config.tokenizer.path] if config.tokenizer else [])
    cards = {path: missing(path, config.base) for path in paths if path is not None}
    return [f"{path}: {how_to_get(card)}" for path, card in cards.items() if card is not None]


def read_tokenizer(folder: Path | str, revision: str | None = None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a folder or hub id; a folder is checked before any file of it is opened.

    Returns:
        None for a folder without a tokenizer: a model's folder need not have one.
    """
    if isinstance(folder, Path):
        check_tokenizer_folder(folder)
        if not has_tokenizer(folder):
            return None
    return load_tokenizer(str(folder), revision)


def compare_tokenizer(
    run: PreTrainedTokenizerBase, folder: Path | str, revision: str | None, where: str, *, masked: bool
) -> list[str]:
    """Refuse a loaded model that brings a tokenizer with other ids than the run's.

    Args:
        masked: whether the model is asked about masked tokens.
    Returns:
        Notes about differences that do not matter, or are unknown.
    Raises:
        DataError: as for `check_same_tokenizer`.
    """
    tokenizer = read_tokenizer(folder, revision)
    if tokenizer is None:
        return [f"no tokenizer in {folder}: that its ids mean the same as the run's is taken on trust"]
    return check_same_tokenizer(run, tokenizer, where, masked=masked)


def trained_tokenizer(config: RunConfig, raw: Raw, run: Path, dist: Dist) -> PreTrainedTokenizerBase:
    """Train the run's tokenizer on the train split of `raw`, or load it from the run folder; a collective."""
    settings, origin = config.tokenizer, _origin_of(config, raw)
    assert settings is not None
    folder, columns, closed = run / "tokenizer", origin["text"], origin["closed"]

    def write(fresh: Path) -> None:
        texts = [text for column in columns for text in raw.texts("train", column)]
        texts = texts if config.data[settings.train_on or ""].messages is None else contents(texts)
        with Working(f"training a tokenizer on data.{settings.train_on}", len(texts), "texts") as working:
            shown = working.counting(texts)
            tokenizer = made_tokenizer(config, shown, closed=closed)
        tokenizer.save_pretrained(fresh)

    if dist.is_main and not _is_trained(folder, origin):
        write_sealed(folder, write, {_ORIGIN: origin})
    dist.barrier()
    return load_tokenizer(str(folder))


def made_tokenizer(config: RunConfig, texts: Iterable[str], *, closed: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer as the configuration says, trained on texts.

    Args:
        closed: whether every text ends with its end token.
    """
    settings = config.tokenizer
    assert settings is not None
    template = None if settings.chat_template is None else find_template(settings.chat_template, config.base)
    tokens = (*(template.tokens if template is not None else ()), *settings.special_tokens)
    tokenizer = train_tokenizer(
        texts, settings.vocab_size, closed=closed, commands=settings.commands, special_tokens=tokens
    )
    if template is not None:
        give_template(tokenizer, template, settings.special_tokens, trained=True)
    return tokenizer


def tokenizer_is_trained(config: RunConfig, raw: Raw, run: Path) -> bool:
    """Whether the run folder has the tokenizer that this run would train on `raw`."""
    return _is_trained(run / "tokenizer", _origin_of(config, raw))


def _origin_of(config: RunConfig, raw: Raw) -> dict[str, Any]:
    """What determines the tokenizer that a run trains."""
    settings = config.tokenizer
    assert settings is not None
    assert settings.train_on is not None
    data = config.data[settings.train_on]
    columns, closed = [*data.text_columns], data.task != "causal-lm"
    origin = {"data": raw.fingerprint, "text": columns, "vocab_size": settings.vocab_size, "closed": closed}
    origin |= {"commands": settings.commands} if settings.commands != "plain" else {}
    origin |= {"special_tokens": [*settings.special_tokens]} if settings.special_tokens else {}
    template = settings.chat_template
    return origin | ({"chat_template": find_template(template, config.base).text} if template is not None else {})


def _is_trained(folder: Path, origin: dict[str, Any]) -> bool:
    """Whether the run folder has an intact tokenizer of this origin; a damaged one is trained again."""
    if not os.path.lexists(folder):
        return False
    try:
        note = folder / _ORIGIN_FILE
        if note.exists() and not (folder / MANIFEST).exists():  # an earlier version's, without a seal
            return read_object(note) == origin
        return bool(check_seal(folder, shared=True).get(_ORIGIN) == origin)
    except DataError as error:
        say(f"trained again: {error.where}: {error.message}")
        return False
