"""What every task does with rows: their texts, ids without special tokens, and what the documents are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.data.collate import Documents
from mtkd.data.files import read_texts
from mtkd.data.transfer import transfer_tokens
from mtkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.tasks import PrepareRequest

TOKENIZED_AT_ONCE = 1_000
"""Texts."""


def texts_of(request: PrepareRequest) -> tuple[list[str], np.ndarray]:
    """The texts that are not blank, and their row numbers; blank rows have nothing to predict."""
    every = column_of(request, request.config.text, "text")
    rows = np.array([row for row, text in enumerate(every) if text.strip()], np.int64)
    if not len(rows):
        raise DataError("all texts are blank", where=request.origin.name, found=f"{len(every)} blank rows")
    return [every[row] for row in rows], rows


def column_of(request: PrepareRequest, column: str, option: str) -> list[str]:
    return read_texts(request.rows, column, request.origin, option)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    """Ids without special tokens, text by text."""
    for begin in range(0, len(texts), TOKENIZED_AT_ONCE):
        # verbose=False: longer than the model's maximum is fine here, documents are cut into blocks afterwards
        yield from tokenizer(
            list(texts[begin : begin + TOKENIZED_AT_ONCE]),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]


def tokenized(request: PrepareRequest, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of every text without special tokens, replaced where the `data` block makes a transfer set of them."""
    return transfer_tokens(list(tokenize(request.tokenizer, texts)), request.config, request.tokenizer, request.split)


def around_text(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    probe = "a"
    bare: list[int] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer(probe)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    raise DataError("the tokenizer changes a text when it adds special tokens", where="tokenizer", found=full)


def described(request: PrepareRequest, rows: np.ndarray, of_example: np.ndarray, scored: np.ndarray) -> Documents:
    names = _optional(request, "name", rows) or [f"{request.split}:{request.origin.rows[row] + 1}" for row in rows]
    domains = _optional(request, "domain", rows) or [""] * len(rows)
    return Documents(of_example, names, domains, scored, _teachers(request, rows))


def _teachers(request: PrepareRequest, rows: np.ndarray) -> tuple[str, ...]:
    """What the column of teachers' names says, "" where it is no text; () when there is no such column."""
    column = request.config.teacher
    if column not in request.rows.column_names:
        return ()
    values: list[Any] = request.rows[column][:]
    return tuple(values[row].strip() if isinstance(values[row], str) else "" for row in rows)


def _optional(request: PrepareRequest, column: str, rows: np.ndarray) -> list[str]:
    """A column of text that a source may have, for the given rows; [] when it has none."""
    if column not in request.rows.column_names:
        return []
    values: list[Any] = request.rows[column][:]
    return [values[row] for row in rows] if all(isinstance(value, str) for value in values) else []


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
