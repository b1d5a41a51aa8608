"""A `data` entry as token ids: every split tokenised for its task, and the fingerprint of all of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.chat import check_chat_template
from mtkd.data.mixture import Mixture
from mtkd.data.split import PrepareRequest, Split
from mtkd.data.tasks import TaskSpec
from mtkd.data.tokenizers import tokenizer_fingerprint
from mtkd.errors import DataError
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import DataConfig
    from mtkd.data.raw import Raw


PLACES = {"source", "path", "files", "revision"}
"""Fields of a `data` block that say where the data is, not what it is; its content has a fingerprint of its own."""


@dataclass(frozen=True)
class LoadedData:
    """A `data` entry, tokenised.

    Attributes:
        splits: train, validation, test (those that were wanted and exist).
        label_names: class names by number; () for token tasks and regression.
        num_labels: outputs of the classifier; 1 for regression, 0 for token tasks.
        fingerprint: sha256 (hexadecimal) over the content, the tokenizer, its chat template where that is
            read, and every option that shapes the examples.
    """

    name: str
    config: DataConfig
    task: TaskSpec
    splits: dict[str, Split]
    label_names: tuple[str, ...] = ()
    num_labels: int = 0
    fingerprint: str = field(default="")


def load_data(
    name: str,
    config: DataConfig,
    raw: Raw,
    tokenizer: PreTrainedTokenizerBase,
    splits: Iterable[str] = ("train", "validation", "test"),
) -> LoadedData:
    """Tokenise the wanted splits of a source for the task of its `data` block.

    Args:
        name: of the `data` entry, for messages.

    Raises:
        UserError, DataError: naming the file and row where there is one.
    """
    if config.templated:
        check_chat_template(tokenizer, f"data.{name}.{'chat' if config.chat else 'messages'}")
    task: TaskSpec = TASKS.find(config.task, f"data.{name}.task")
    label_names, num_labels = task.labels(config, raw)
    tokenised: dict[str, Split] = {}
    marked: list[str] = []  # in their fingerprint: caches of 28 November and before have these tokens twice
    for split in splits:
        if split in raw.splits:
            request = PrepareRequest(
                split=split,
                rows=raw.splits[split],
                origin=raw.origin(split),
                config=config,
                tokenizer=tokenizer,
                label_names=label_names,
                num_labels=num_labels,
                names=config.name or raw.names,
                domains=config.domain or raw.domains,
            )
            prepared = task.prepare(request)
            if config.parts and split == "train":
                prepared = replace(prepared, mixture=_mixture(config, raw, prepared))
            notes = [prepared.note] if prepared.note else []
            notes += [prepared.mixture.note()] if prepared.mixture is not None else []
            if count := request.seen["marked"]:
                marked.append(split)
                many = f"{raw.origin(split).name} ({split}): {count:,} texts bring their own beginning or end token"
                notes.append(f"{many}, which stands there once")
            tokenised[split] = replace(prepared, redraws=config.redraw, note="\n".join(notes))
    options = config.values({*PLACES, "mix"})  # of which examples, not of how often
    of_tokenizer = tokenizer_fingerprint(tokenizer, chat=config.templated)
    parts = [raw.fingerprint, of_tokenizer, json.dumps(options, sort_keys=True), *label_names]
    parts += [f"marks once: {', '.join(marked)}"] if marked else []
    fingerprint = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    return LoadedData(name, config, task, tokenised, label_names, num_labels, fingerprint)


def _mixture(config: DataConfig, raw: Raw, split: Split) -> Mixture:
    """The shares of the mixed entries; raises DataError for one of which no example is left."""
    names = list(config.parts)
    part_of = np.array([names.index(part) for part in split.cut_from.parts], np.int64)[split.documents]
    for number, name in enumerate(names):
        if not (part_of == number).any():
            raise DataError(
                f"no example of data.{name} is left in the mix",
                where=raw.origin("train").name,
                found="every row left out",
                todo="set a larger data.NAME.max_length, or drop it from mix",
            )
    return Mixture.of(names, [config.mix[name] for name in names], part_of)
