"""A tokenised split: its examples, the documents they were cut from, and padded batches of some of them."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch

from mtkd.config import DataConfig
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.data.files import Origin
from mtkd.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.infilling import LaidOut

_FILLER_LENGTH = 2  # tokens of a batch in which nothing counts
NO_EXAMPLE = -1  # `Batch.ids` of a filler row


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
    """

    of_example: np.ndarray
    names: list[str]
    domains: list[str]
    bytes: np.ndarray
    teachers: tuple[str, ...] = ()


class Examples(Protocol):
    """The examples of one split, tokenised.

    `lengths` may be upper bounds where inputs change with the epoch.

    `read` returns the inputs of example `index` and what they are to predict: int64 [L] for token tasks, a number for
    classification; the third item is token types [L] or None. `epoch` matters only where inputs change with it.
    """

    lengths: np.ndarray  # tokens per example, [examples] int64

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | None]: ...


@runtime_checkable
class Pairs(Protocol):
    """Examples that also ask whether their second segment follows the first: 0 = it does, 1 = it is another's."""

    def next_sentence(self, index: int, epoch: int) -> int: ...


@runtime_checkable
class Laid(Protocol):
    """Examples in two parts, with positions of their own (GLM); what `read` returns is the inputs and targets of it."""

    def lay_out(self, index: int, epoch: int) -> LaidOut: ...


class Split:
    """One tokenised split: its examples, the documents they come from, and batches of them.

    Args:
        examples: the tokenised examples.
        documents: what they were cut from.
        pad_id: token id at padding (never read: the attention mask is by position).
        labels: classification: class number per example [examples] int64, or float32 targets of a regression.
        token_types: whether batches carry token types.
        note: what the person should know of how it was made, e.g. examples left out; "" for nothing.

    Attributes:
        redraws: whether inputs that depend on the epoch do so; else they are those of epoch 0 for ever.
    """

    def __init__(
        self,
        examples: Examples,
        documents: Documents,
        *,
        pad_id: int = 0,
        labels: np.ndarray | None = None,
        token_types: bool = False,
        note: str = "",
    ) -> None:
        self._examples = examples
        self._documents = documents
        self._pad_id = pad_id
        self._token_types = token_types
        self.labels, self.note, self.redraws = labels, note, True
        self.lengths = examples.lengths
        self._routes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def has_targets(self) -> bool:
        """Whether anything is asked of any example: not of classification texts without a label."""
        if self.labels is None:
            return True
        if np.issubdtype(self.labels.dtype, np.floating):
            return not bool(np.isnan(self.labels).all())
        return bool((self.labels != NO_LABEL).any())

    @property
    def documents(self) -> np.ndarray:
        """Document number of each example, [examples] int64."""
        return self._documents.of_example

    @property
    def document_names(self) -> list[str]:
        """A name per document."""
        return self._documents.names

    @property
    def document_domains(self) -> list[str]:
        """A domain per document, "" where the source has none."""
        return self._documents.domains

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of the scored text per document, [documents] int64."""
        return self._documents.bytes

    def routed(self, teachers: Sequence[str], where: str) -> Split:
        """This split with the number of the teacher that each example names, for weighting: route.

        Raises:
            DataError: no such column, or a row that names no teacher or an unknown one.
        """
        found = self._documents.teachers
        todo = "set data.NAME.teacher to the column that names the teachers"
        if not found:
            raise DataError("no column names a teacher for each row", where=where, todo=todo)
        for document, name in enumerate(found):
            if name not in teachers:
                raise DataError(
                    "a row names a teacher that the stage does not have" if name else "a row names no teacher",
                    where=where,
                    found=f"{name or 'nothing'}, in row '{self.document_names[document]}'",
                    allowed=teachers,
                    todo=nearest(name, teachers),
                )
        split = copy.copy(self)
        split._routes = np.array([teachers.index(name) for name in found], np.int64)[self.documents]
        return split

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
        epoch = epoch if self.redraws else 0
        if isinstance(self._examples, Laid):
            return self._collate_laid([self._examples.lay_out(int(i), epoch) for i in indices], indices, num_rows)
        read = [self._examples.read(int(i), epoch) for i in indices]
        length = max((len(tokens) for tokens, _, _ in read), default=_FILLER_LENGTH)
        types = np.zeros((num_rows, length), np.int64) if self._token_types else None
        for row, (tokens, _, token_types) in enumerate(read):
            if types is not None and token_types is not None:
                types[row, : len(tokens)] = token_types
        follows = np.full(num_rows, NO_LABEL, np.int64) if isinstance(self._examples, Pairs) else None
        for row, index in enumerate(indices):
            if follows is not None and isinstance(self._examples, Pairs):
                follows[row] = self._examples.next_sentence(int(index), epoch)
        batch = self._padded([tokens for tokens, _, _ in read], [target for _, target, _ in read], indices, num_rows)
        batch.token_type_ids = torch.from_numpy(types) if types is not None else None
        batch.nsp_targets = torch.from_numpy(follows) if follows is not None else None
        return batch

    def _collate_laid(self, read: Sequence[LaidOut], indices: Sequence[int], num_rows: int) -> Batch:
        batch = self._padded([x.inputs for x in read], [x.targets for x in read], indices, num_rows)
        positions = torch.zeros(num_rows, 2, batch.input_ids.shape[1], dtype=torch.int64)
        sep = torch.ones(num_rows, dtype=torch.int64)  # the one token of a filler row
        for row, example in enumerate(read):
            positions[row, :, : len(example.inputs)] = torch.from_numpy(example.positions)
            sep[row] = example.sep
        batch.position_ids, batch.sep = positions, sep
        return batch

    def _padded(
        self,
        inputs: Sequence[np.ndarray],
        targets: Sequence[np.ndarray | float],
        indices: Sequence[int],
        num_rows: int,
    ) -> Batch:
        """Examples padded on the right to the longest of them, and filler rows."""
        length = max(map(len, inputs), default=_FILLER_LENGTH)
        ids = np.full(num_rows, NO_EXAMPLE, np.int64)
        padded = np.full((num_rows, length), self._pad_id, np.int64)
        attention = np.zeros((num_rows, length), bool)
        attention[len(indices) :, 0] = True  # a filler row without a single token would give softmax over nothing
        wanted = self._no_targets(num_rows, length)
        for row, (index, tokens, target) in enumerate(zip(indices, inputs, targets, strict=True)):
            ids[row] = index
            padded[row, : len(tokens)] = tokens
            attention[row, : len(tokens)] = True
            if isinstance(target, np.ndarray):
                wanted[row, : len(target)] = target
            else:
                wanted[row] = target
        return Batch(
            ids=torch.from_numpy(ids),
            input_ids=torch.from_numpy(padded),
            attention_mask=torch.from_numpy(attention),
            targets=torch.from_numpy(wanted),
            routes=self._routes_of(indices, num_rows),
        )

    def _routes_of(self, indices: Sequence[int], num_rows: int) -> torch.Tensor | None:
        if self._routes is None:
            return None
        routes = torch.full((num_rows,), NO_EXAMPLE)
        routes[: len(indices)] = torch.from_numpy(self._routes[list(indices)])
        return routes

    def _no_targets(self, num_rows: int, length: int) -> np.ndarray:
        if self.labels is None:
            return np.full((num_rows, length), NO_LABEL, np.int64)
        if np.issubdtype(self.labels.dtype, np.floating):
            return np.full(num_rows, np.nan, np.float32)
        return np.full(num_rows, NO_LABEL, np.int64)
