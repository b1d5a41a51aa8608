"""What every task does with rows: their texts, ids without special tokens, and what the documents are called."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.files import read_domains, read_texts, values_of
from mtkd.data.marks import without_marks
from mtkd.data.progress import counted
from mtkd.data.split import Documents
from mtkd.data.transfer import transfer_tokens
from mtkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.files import Origin
    from mtkd.data.split import PrepareRequest

PART = "part"
"""Column of mixed rows that names the `data` entry of each."""

TOKENIZED_AT_ONCE = 1_000
"""Texts."""


def texts_of(request: PrepareRequest) -> tuple[list[str], np.ndarray]:
    """The texts that are not blank, without their own marks, and their row numbers; blank rows predict nothing."""
    # A chat template ends a turn, so that the response may not do so too.
    every = without_marks(request, column_of(request, request.config.text, "text"))
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
    ids = tokenize(request.tokenizer, texts)
    shown = counted(ids, f"tokenizing {request.origin.name} ({request.split})", len(texts))
    return transfer_tokens(list(shown), request.config, request.tokenizer, request.split)


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
    """What examples were cut from: rows differ by their number, unless the configuration or source names them.

    Raises:
        DataError: two rows with one name, or a row without a name.
    """
    names = [f"{request.split}:{request.origin.rows[row] + 1}" for row in rows]
    domains = [""] * len(rows)
    if request.domains:
        every = read_domains(request.rows, request.domains, request.origin)
        domains = [every[row] for row in rows]
    if request.names:
        mask = np.zeros(len(request.rows), bool)
        mask[rows] = True
        check_names(request.rows, request.origin, request.names, request.domains, mask)
        every = column_of(request, request.names, "name")
        names = [every[row] for row in rows]
    teachers = teachers_of(request.rows, request.config.teacher)
    parts = values_of(request.rows, PART) if request.config.parts else []
    return Documents(
        of_example,
        names,
        domains,
        scored,
        tuple(teachers[row] for row in rows) if teachers else (),
        tuple(parts[row] for row in rows) if parts else (),
    )


def check_names(rows: Dataset, origin: Origin, names: str, domains: str, mask: np.ndarray) -> None:
    """Names are unique within a domain: scores of two models are compared row by row.

    Args:
        names, domains: the columns; "" for none.
        mask: which rows count, bool [rows].

    Raises:
        DataError: two rows with one name, or a row without a name.
    """
    domain_of = read_domains(rows, domains, origin) if domains else [""] * len(rows)
    if not names:
        return
    first: dict[tuple[str, str], int] = {}
    every = read_texts(rows, names, origin, "name")
    for row in map(int, np.flatnonzero(mask)):
        other = first.setdefault((domain_of[row], every[row]), row)
        if other != row:
            raise DataError(
                "two rows have the same name",
                where=origin.where(row),
                found=f"{every[row]}, as in {origin.where(other)}",
                todo="drop `name` from the data entry: rows are then named by their number",
            )


def teachers_of(rows: Dataset, column: str) -> list[str]:
    """What the column of teachers' names says, "" where it is no text; [] when there is no such column."""
    if column not in rows.column_names:
        return []
    values = values_of(rows, column)
    return [value.strip() if isinstance(value, str) else "" for value in values]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return int(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else 0
