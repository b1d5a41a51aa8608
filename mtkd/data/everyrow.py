"""Every row of a data entry as `mtkd plan` meets it, so that none is refused hours later.

What needs no tokenizer is looked at in every row: texts, names, domains, teachers, the blank of a cloze. Rows are
tokenised as the run will do it: all of a split with at most `_MOST_ROWS` rows and `_MOST_CHARACTERS` characters. Of a
larger one about as many are, evenly spread, and with them each short text that may turn out to have too few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import BLANK, DataConfig
from mtkd.data.encode import check_names, teachers_of
from mtkd.data.files import Origin, read_domains, read_texts, require_column
from mtkd.data.load import load_data
from mtkd.data.progress import Working
from mtkd.data.split import Split
from mtkd.errors import DataError, nearest
from mtkd.registry import TASKS

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.domains import Domains
    from mtkd.data.raw import Raw

_MOST_ROWS, _MOST_CHARACTERS = 50_000, 5_000_000
"""Of a split: a few seconds, most of them for chat templates (16,000 rows a second)."""
_FIRST = 32
"""Rows that are always among those looked at: the plan shows examples of them."""
_SHORT = 16
"""Characters of a text that may be a single token although it has spaces, which some tokenizers drop."""


@dataclass(frozen=True)
class Looked:
    """What the rows are like.

    Attributes:
        splits: the rows that were looked at, tokenised, the first ones among them.
        notes: what is blank, left out or cut, and how many rows were tokenised where not all were.
        unmade: split -> why the rows that were looked at make no example where others may.
    """

    splits: Mapping[str, Split]
    notes: tuple[str, ...]
    unmade: Mapping[str, str]


def look_at_rows(name: str, config: DataConfig, raw: Raw, tokenizer: PreTrainedTokenizerBase | None) -> Looked:
    """Meet the rows of a data entry.

    Args:
        name: of the entry. raw: its rows after hold-out and limit. tokenizer: None while it is not there.

    Raises:
        UserError, DataError: naming the file and row.
    """
    splits, unmade, notes = dict[str, Split](), dict[str, str](), list[str]()
    with Working(f"looking at the rows of data.{name}", sum(map(len, raw.splits.values()))) as working:
        done = 0
        for split, rows in raw.splits.items():
            working.at(done)
            texts = _Texts(config, rows, raw.origin(split))
            working.at(done)
            texts.check_blanks()
            notes += texts.blank_note(split)
            check_names(rows, raw.origin(split), config.name or raw.names, config.domain or raw.domains, texts.kept)
            working.at(done := done + len(rows) // 2)
            if tokenizer is not None:
                _tokenise(name, texts, raw, split, tokenizer, (splits, unmade, notes))
            working.at(done := done + len(rows) - len(rows) // 2)
    return Looked(splits, tuple(notes), unmade)


def check_routes(rows: Dataset, origin: Origin, config: DataConfig, teachers: Sequence[str], where: str) -> None:
    """Refuse a row that names no teacher of the stage, for weighting: route.

    Args:
        where: of the weighting.

    Raises:
        DataError: no such column; or naming the row.
    """
    require_column(rows, config.teacher, origin, "teacher")
    mask = _Texts(config, rows, origin).kept
    for row, teacher in enumerate(teachers_of(rows, config.teacher)):
        if mask[row] and teacher not in teachers:
            raise DataError(
                "a row names a teacher that the stage does not have" if teacher else "a row names no teacher",
                where=origin.where(row),
                found=teacher or "nothing",
                allowed=teachers,
                todo=nearest(teacher, teachers) or f"correct the row, or choose another weighting at {where}",
            )


def check_domains(raw: Raw, config: DataConfig, domains: Domains, where: str) -> None:
    """Refuse a training row whose domain no teacher teaches, and a teacher whose domain no row has.

    Args:
        where: the stage's teachers.

    Raises:
        DataError: no such column; or naming the row, or the domain.
    """
    column, rows, origin = config.domain or raw.domains, raw.splits["train"], raw.origin("train")
    if not column:
        raise DataError(
            "a teacher has a domain, and nothing says the domain of a row",
            where=where,
            todo="set data.NAME.domain to the column that holds it, or drop the teachers' `domain`",
        )
    mask, names = _Texts(config, rows, origin).kept, read_domains(rows, column, origin)
    domains.check(((name, origin.where(row)) for row, name in enumerate(names) if mask[row]), where)


class _Texts:
    """The texts of a split, and which rows of them count."""

    def __init__(self, config: DataConfig, rows: Dataset, origin: Origin) -> None:
        self.config, self.origin, self.task = config, origin, TASKS.find(config.task)
        names = dict.fromkeys(filter(None, (*config.text_columns, config.text_pair)))
        self.columns = {name: read_texts(rows, name, origin, "text") for name in names}
        self.lengths = np.zeros(len(rows), np.int64)
        for texts in self.columns.values():
            self.lengths += np.fromiter(map(len, texts), np.int64, len(texts))
        needed = [*config.filled_columns] if self.task.token_level else list(self.columns)
        self.filled = np.zeros(len(rows), bool)
        for name in needed:
            self.filled |= np.fromiter((bool(text.strip()) for text in self.columns[name]), bool, len(rows))
        self.kept = self.filled if self.task.token_level else np.ones(len(rows), bool)

    def check_blanks(self) -> None:
        """Refuse a text that holds the blank of a cloze itself."""
        for texts in self.columns.values() if self.config.cloze is not None else ():
            for row, text in enumerate(texts):
                if BLANK in text:
                    where = self.origin.where(row)
                    raise DataError(
                        "a text holds the blank itself", where=where, found=text[:160], allowed=f"no {BLANK}"
                    )

    def blank_note(self, split: str) -> list[str]:
        blank = np.flatnonzero(~self.filled)
        if not len(blank):
            return []
        effect = "left out" if self.task.token_level else "read as an empty text"
        count = f"{len(blank):,} of {len(self.filled):,} rows have no text, the first is {self.origin.where(blank[0])}"
        return [f"{self.origin.name} ({split}): {count}; {effect}"]

    def chosen(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """The rows to tokenise: all of them, or some that are evenly spread and all that may be too short."""
        total = len(self.lengths)
        share = max(total / _MOST_ROWS, float(self.lengths.sum()) / _MOST_CHARACTERS)
        if share <= 1:
            return np.arange(total)
        few = np.arange(0, total, int(np.ceil(share)))
        return np.unique(np.concatenate([np.arange(min(_FIRST, total)), few, self._short(tokenizer)]))

    def _short(self, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
        """Rows whose tokens may be too few for the task; none where the tokenizer adds enough of its own."""
        around = len(tokenizer("a")["input_ids"]) - len(tokenizer("a", add_special_tokens=False)["input_ids"])
        if around > 1 and not self.config.next_sentence:
            return np.zeros(0, np.int64)
        texts = next(iter(self.columns.values()))
        short = [row for row, text in enumerate(texts) if len(text) <= _SHORT or len(text.split(maxsplit=1)) < 2]
        return np.array(short, np.int64)


_Found = tuple[dict[str, Split], dict[str, str], list[str]]


def _tokenise(
    name: str, texts: _Texts, raw: Raw, split: str, tokenizer: PreTrainedTokenizerBase, results: _Found
) -> None:
    """Make examples of the chosen rows; add to splits, reasons and notes."""
    splits, unmade, notes = results
    rows, origin = raw.splits[split], raw.origin(split)
    chosen = texts.chosen(tokenizer)
    every = len(chosen) == len(rows)
    few = raw
    if not every:
        few = replace(raw, splits={split: rows.select(chosen)}, origins={split: origin.select(chosen)})
        notes.append(f"{origin.name} ({split}): {len(chosen):,} of {len(rows):,} rows were tokenised for this plan")
    try:
        splits[split] = load_data(name, texts.config, few, tokenizer, (split,)).splits[split]
    except DataError as error:
        if every or error.where != origin.name:
            raise
        unmade[split] = f"the {len(chosen):,} rows looked at make no example: {error.message}"
    else:
        notes += splits[split].note.splitlines()
