"""What student and teachers hand to the objective: named tensors, and logits that are computed when read.

Dimension legend, used in every shape comment of this library:
    B batch, L tokens, H hidden width, A heads, D head width, V vocabulary, C classes, N layers, T teachers,
    n selected positions (a flat index over B*L).

Feature keys are strings "name.layer": ``hidden.0`` is the embedding output, ``hidden.N`` the last layer; attention
features count from 1. Strings, not tuples: ZeRO-3 walks module outputs and crashes on tuple keys.

    logits        token logits [B,L,V] behind `Logits`, or class logits [B,C]
    nsp_logits    next-sentence logits [B,2] behind `Logits`
    embedding     the same tensor as hidden.0                           [B,L,H]
    hidden.k      output of layer k                                     [B,L,H]
    cls.k         hidden.k at the first token                           [B,H]
    query.k, key.k, value.k   after rotary embedding, per head          [B,A,L,D]
    scores.k      QK^T * scaling, before softmax, masked entries -inf   [B,A,L,L]
    probs.k       softmax(scores.k)                                     [B,A,L,L]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mtkd.products import product

NO_LABEL = -100
"""A target with this id is not a target (the convention of torch's cross entropy)."""

LAYERED = ("hidden", "cls", "query", "key", "value", "scores", "probs")
UNLAYERED = ("logits", "nsp_logits", "embedding")
ATTENTION = ("query", "key", "value", "scores", "probs")
FEATURE_NAMES = UNLAYERED + LAYERED


def split_key(key: str) -> tuple[str, int | None]:
    """``"hidden.4" -> ("hidden", 4)``; ``"logits" -> ("logits", None)``.

    Raises:
        ValueError: for a key outside the grammar.
    """
    name, dot, layer = key.partition(".")
    if (name in UNLAYERED and not dot) or (name in LAYERED and layer.isdigit()):
        return name, int(layer) if dot else None
    raise ValueError(f"not a feature key: {key!r}")


class Logits(Protocol):
    """Logits over V columns for B*L (or B) positions; computed for the rows that are read."""

    @property
    def num_columns(self) -> int: ...

    def rows(self, index: Tensor) -> Tensor:
        """Logits of the flat positions `index` [n] -> [n,V], float32."""
        ...

    def select(self, columns: Tensor) -> Logits:
        """The logits of some columns only, [K] int64: a softmax over them does not know the others."""
        ...

    def in_dtype(self, dtype: torch.dtype) -> Logits:
        """The same logits with matrix products in `dtype`; casts the head once instead of once per tile."""
        ...


@dataclass
class DenseLogits:
    """Logits that exist already: class logits [B,C] (or small token logits [B,L,V])."""

    values: Tensor  # [..., C]

    @property
    def num_columns(self) -> int:
        return self.values.shape[-1]

    def rows(self, index: Tensor) -> Tensor:
        return self.values.reshape(-1, self.num_columns)[index].float()

    def select(self, columns: Tensor) -> DenseLogits:
        return DenseLogits(self.values.index_select(-1, columns))

    def in_dtype(self, dtype: torch.dtype) -> DenseLogits:
        return self


@dataclass
class HeadLogits:
    """Logits as the product of hidden states and an output head, computed tile by tile.

    Attributes:
        hidden: the head's input, [B,L,H].
        weight: the head, [V_padded,H]; columns at and after `num_columns` are padding and never computed.
        bias: [V_padded] or None.
        columns: number of real token ids.
        transform: what the model does to logits after the head (scale, soft cap), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    columns: int
    transform: Callable[[Tensor], Tensor] | None = None

    @property
    def num_columns(self) -> int:
        return self.columns

    def rows(self, index: Tensor) -> Tensor:
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1])[index]
        logits = product(hidden, self.weight[: self.columns]).float()
        if self.bias is not None:
            logits = logits + self.bias[: self.columns].float()
        return logits if self.transform is None else self.transform(logits)

    def select(self, columns: Tensor) -> HeadLogits:
        # the rows of the head are chosen, not those of the product: the others are never computed
        bias = None if self.bias is None else self.bias.index_select(0, columns)
        return HeadLogits(self.hidden, self.weight.index_select(0, columns), bias, len(columns), self.transform)

    def in_dtype(self, dtype: torch.dtype) -> HeadLogits:
        # the bias is added in float32: it costs nothing and saves a rounding
        return HeadLogits(self.hidden.to(dtype), self.weight.to(dtype), self.bias, self.columns, self.transform)


Features = dict[str, Tensor | Logits]
