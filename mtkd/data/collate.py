"""Examples of a split as one padded batch: a function per kind of examples, which the task chooses with the split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL, Batch

if TYPE_CHECKING:
    from mtkd.data.infilling import LaidOut

NO_EXAMPLE = -1
"""`Batch.keys` of a filler row."""

_FILLER_LENGTH = 2  # tokens of a batch in which nothing counts


class Examples(Protocol):
    """The examples of one split, tokenised; `lengths` may be upper bounds where inputs change with the epoch."""

    lengths: np.ndarray  # tokens per example, [examples] int64

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray | float, np.ndarray | None]:
        """An example's inputs [L], what they predict ([L], or a number), and token types [L] or None.

        Args:
            epoch: matters only where inputs change with it.
        """
        ...


class Prompted(Examples, Protocol):
    """Examples that are a prompt, which is read, and a response, which another one may take the place of."""

    @property
    def prompts(self) -> np.ndarray:
        """Tokens of each prompt, [examples] int64."""
        ...

    def prompt(self, index: int) -> np.ndarray:
        """The ids of an example's prompt."""
        ...


class Pairs(Protocol):
    """Examples that also ask whether their second segment follows the first: 0 = it does, 1 = it is another's."""

    lengths: np.ndarray

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...

    def next_sentence(self, index: int, epoch: int) -> int: ...


class Laid(Protocol):
    """Examples in two parts, with positions of their own (GLM)."""

    lengths: np.ndarray

    def lay_out(self, index: int, epoch: int) -> LaidOut: ...


@dataclass(frozen=True)
class Rows:
    """The rows of a batch before their text: which examples, then filler rows, in which nothing counts.

    Attributes:
        indices: example numbers. num_rows: B, at least as many.
        epoch: pass over the data.
        pad_id: token id at padding.
        token_types: whether the batch carries them.
        no_target: target of an example that has none; None where every token has its own.
        origin: document of each example of the split. routes: teacher of each, or None; [examples] int64.
    """

    indices: Sequence[int]
    num_rows: int
    epoch: int
    pad_id: int
    token_types: bool
    no_target: np.generic | None
    origin: np.ndarray
    routes: np.ndarray | None

    def column(self, values: np.ndarray) -> Tensor:
        """A value per row, [B]; `NO_EXAMPLE` in filler rows. `values`: per example of the batch."""
        column = np.full(self.num_rows, NO_EXAMPLE, np.int64)
        column[: len(self.indices)] = values
        return torch.from_numpy(column)

    def batch(
        self,
        inputs: Sequence[np.ndarray],
        targets: Sequence[np.ndarray | float],
        types: Sequence[np.ndarray] = (),
    ) -> Batch:
        """Examples padded on the right to the longest of them, and filler rows.

        Args:
            inputs, targets, types: per example; types are read where batches carry them.
        """
        input_ids = self.padded(inputs, self.pad_id)
        attention = self.padded([np.ones(len(tokens)) for tokens in inputs], 0).bool()
        attention[len(self.indices) :, 0] = True  # softmax over a row without a single token would be over nothing
        return Batch(
            keys=self.column(np.array(self.indices, np.int64)),
            input_ids=input_ids,
            attention_mask=attention,
            targets=self._targets(targets, input_ids.shape[1]),
            token_type_ids=self.padded(types, 0) if self.token_types else None,
            routes=None if self.routes is None else self.column(self.routes[list(self.indices)]),
            origin=self.column(self.origin[list(self.indices)]),
        )

    def padded(self, rows: Sequence[np.ndarray], fill: int) -> Tensor:
        """Values per token as one tensor, [B,L] int64."""
        length = max(map(len, rows), default=_FILLER_LENGTH)
        padded = np.full((self.num_rows, length), fill, np.int64)
        for row, values in zip(padded, rows, strict=False):
            row[: len(values)] = values
        return torch.from_numpy(padded)

    def _targets(self, targets: Sequence[np.ndarray | float], length: int) -> Tensor:
        """[B,L] where every token has its own, else [B]."""
        if self.no_target is not None:
            one_each = np.full(self.num_rows, self.no_target)
            one_each[: len(targets)] = targets
            return torch.from_numpy(one_each)
        padded = np.full((self.num_rows, length), NO_LABEL, np.int64)
        for row, values in zip(padded, targets, strict=False):
            assert isinstance(values, np.ndarray)
            row[: len(values)] = values
        return torch.from_numpy(padded)


def collate_tokens(examples: Examples, rows: Rows) -> Batch:
    """Texts whose tokens, or whose class, are asked for."""
    read = [examples.read(int(i), rows.epoch) for i in rows.indices]
    types = [kinds for _, _, kinds in read if kinds is not None]  # of all or of none: the tokenizer decides
    return rows.batch([inputs for inputs, _, _ in read], [targets for _, targets, _ in read], types)


def collate_pairs(examples: Pairs, rows: Rows) -> Batch:
    """Pairs of segments whose masked tokens are asked for, and whether the second follows the first."""
    follows = np.full(rows.num_rows, NO_LABEL, np.int64)
    follows[: len(rows.indices)] = [examples.next_sentence(int(i), rows.epoch) for i in rows.indices]
    return replace(collate_tokens(examples, rows), nsp_targets=torch.from_numpy(follows))


def collate_laid(examples: Laid, rows: Rows) -> Batch:
    """Texts in two parts, with positions of their own; part B is asked for."""
    read = [examples.lay_out(int(i), rows.epoch) for i in rows.indices]
    batch = rows.batch([laid.inputs for laid in read], [laid.targets for laid in read])
    positions = torch.zeros(rows.num_rows, 2, batch.input_ids.shape[1], dtype=torch.int64)  # [B,2,L]
    sep = torch.ones(rows.num_rows, dtype=torch.int64)  # [B]; 1: the one token of a filler row
    for row, laid in enumerate(read):
        positions[row, :, : len(laid.inputs)] = torch.from_numpy(laid.positions)
        sep[row] = laid.sep
    return replace(batch, position_ids=positions, sep=sep)
