"""A tokenised split: its examples, the documents they were cut from, and padded batches of some of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import DataConfig
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.data.collate import Prompted, Rows
from mtkd.data.files import Origin
from mtkd.data.mixture import Mixture
from mtkd.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.domains import Domains


@dataclass(frozen=True)
class PrepareRequest:
    """All that a task needs to make a split: rows, where they come from, how, the classes, and columns of names.

    `seen` counts what is found on the way: "marked", texts that brought their own beginning or end token.
    """

    split: str
    rows: Dataset
    origin: Origin
    config: DataConfig
    tokenizer: PreTrainedTokenizerBase
    label_names: tuple[str, ...] = ()
    num_labels: int = 0
    names: str = ""
    domains: str = ""
    seen: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Documents:
    """What the examples of a split were cut from; one document per row for classification.

    Attributes:
        of_example: document number of each example, [examples] int64.
        names: a name per document.
        domains: a domain per document, "" where the source has none.
        bytes: UTF-8 bytes of the text that is predicted (read, for classification) per document, [documents] int64.
        teachers: name of the teacher each document is distilled from, "" where it has none; () without such a column.
        parts: the `data` entry that each is of, where several are mixed.
    """

    of_example: np.ndarray
    names: list[str]
    domains: list[str]
    bytes: np.ndarray
    teachers: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Split:
    """One tokenised split: its examples, the documents they come from, and batches of them.

    Attributes:
        make_batch: rows -> a batch; a function of `mtkd.data.collate` with the task's examples.
        lengths: tokens per example, [examples] int64; upper bounds where inputs change with the epoch.
        cut_from: the documents of the examples.
        pad_id: token id at padding (never read: the attention mask is by position).
        labels: classification: class number per example [examples] int64, or float32 targets of a regression.
        token_types: whether batches carry token types.
        note: what the person should know of how it was made, e.g. examples left out; "" for nothing.
        redraws: whether inputs that depend on the epoch do so; else they are those of epoch 0 for ever.
        routes: number of the teacher of each example, or of its domain, [examples] int64; see `routed`, `in_domains`.
        prompted: prompts and responses of the examples, where they have some; models may write other responses.
        mixture: which examples make an epoch of training; None: each once.
    """

    make_batch: Callable[[Rows], Batch]
    lengths: np.ndarray
    cut_from: Documents
    pad_id: int = 0
    labels: np.ndarray | None = None
    token_types: bool = False
    note: str = ""
    redraws: bool = True
    routes: np.ndarray | None = None
    prompted: Prompted | None = None
    mixture: Mixture | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_targets(self) -> bool:
        """Whether anything is asked of any example: not of classification texts without a label."""
        if self.labels is None:
            return self.prompted is None or bool(self.document_bytes.any())
        if np.issubdtype(self.labels.dtype, np.floating):
            return not bool(np.isnan(self.labels).all())
        return bool((self.labels != NO_LABEL).any())

    @property
    def documents(self) -> np.ndarray:
        """Document number of each example, [examples] int64."""
        return self.cut_from.of_example

    @property
    def document_names(self) -> list[str]:
        """A name per document."""
        return self.cut_from.names

    @property
    def document_domains(self) -> list[str]:
        """A domain per document, "" where the source has none."""
        return self.cut_from.domains

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the scored text per document, [documents] int64."""
        return self.cut_from.bytes

    def routed(self, teachers: Sequence[str], where: str) -> Split:
        """This split with the number of the teacher that each example names, for weighting: route.

        Raises:
            DataError: no such column, or a row that names no teacher or an unknown one.
        """
        names = self.cut_from.teachers
        todo = "set data.NAME.teacher to the column that names the teachers"
        if not names:
            raise DataError("no column names a teacher for each row", where=where, todo=todo)
        for document, name in enumerate(names):
            if name not in teachers:
                raise DataError(
                    "a row names a teacher that the stage does not have" if name else "a row names no teacher",
                    where=where,
                    found=f"{name or 'nothing'}, in row '{self.document_names[document]}'",
                    allowed=teachers,
                    todo=nearest(name, teachers),
                )
        return replace(self, routes=np.array([teachers.index(name) for name in names], np.int64)[self.documents])

    def in_domains(self, domains: Domains, where: str) -> Split:
        """This split with the number of each example's domain, for teachers that name theirs.

        Raises:
            DataError: a domain that no teacher teaches, or that no text has.
        """
        of_document = self.document_domains
        domains.check(zip(of_document, (f"row '{name}'" for name in self.document_names), strict=True), where)
        return replace(self, routes=np.array([domains.number(name) for name in of_document], np.int64)[self.documents])

    def collate(self, indices: Sequence[int], *, size: int | None = None, epoch: int = 0) -> Batch:
        """The examples of some numbers as one batch, padded on the right to the longest of them.

        Args:
            indices: example numbers; [] makes a batch of filler rows only.
            size: rows; missing ones are filler rows, in which nothing counts.
            epoch: pass over the data; decides what is asked for in training (masked-lm, glm-infill).

        Returns:
            Batch with `size` (or len(indices)) rows.
        """
        num_rows = len(indices) if size is None else size
        if num_rows < max(1, len(indices)):
            raise ValueError(f"{len(indices)} examples do not make a batch of {num_rows} rows")
        return self.make_batch(
            Rows(
                indices=indices,
                num_rows=num_rows,
                epoch=epoch if self.redraws else 0,
                pad_id=self.pad_id,
                token_types=self.token_types,
                no_target=self._no_target(),
                origin=self.documents,
                routes=self.routes,
            )
        )

    def _no_target(self) -> np.generic | None:
        if self.labels is None:
            return None
        return np.float32(np.nan) if np.issubdtype(self.labels.dtype, np.floating) else np.int64(NO_LABEL)
