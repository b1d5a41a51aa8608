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
from dataclasses import dataclass, field
from typing import Protocol, get_args

import torch
from torch import Tensor

from mtkd.config.match import ATTENTION_FEATURES, UNLAYERED_FEATURES, FeatureName
from mtkd.data.device import free_to_ask
from mtkd.errors import DataError, UserError
from mtkd.models.products import product

FEATURE_NAMES: tuple[str, ...] = get_args(FeatureName)
UNLAYERED, ATTENTION = UNLAYERED_FEATURES, ATTENTION_FEATURES
LAYERED = tuple(name for name in FEATURE_NAMES if name not in UNLAYERED)


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
    """Logits that exist already: class logits [B,C] (or small token logits [B,L,V]).

    Attributes:
        other: logits of a specialist's outputs that mean "none of my classes", [B,R]; None where it has none. No
            softmax over the classes knows them. Who scales `values` scales them too (`divided`).
    """

    values: Tensor  # [..., C]
    other: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.values.shape[-1]

    def rows(self, index: Tensor) -> Tensor:
        return self.values.reshape(-1, self.num_columns)[index].float()

    def select(self, columns: Tensor) -> DenseLogits:
        return DenseLogits(self.values.index_select(-1, columns), self.other)

    def divided(self, temperature: float) -> DenseLogits:
        """All logits divided by a temperature, before any softmax reads them."""
        other = None if self.other is None else self.other.float() / temperature
        return DenseLogits(self.values.float() / temperature, other)

    def own_mass(self) -> Tensor:
        """Probability of all classes together, over all outputs, [B] float32: 1 - p(other); 1 without such outputs.

        As a sigmoid of the difference of the two sides: `1 - p` would round to 0 long before.
        """
        if self.other is None:
            return torch.ones_like(self.values[..., 0], dtype=torch.float32)
        return torch.sigmoid(self.values.float().logsumexp(-1) - self.other.float().logsumexp(-1))

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


@dataclass
class SparseRows:
    """What is known of a teacher's distribution at m positions.

    Attributes:
        ids: columns, distinct at a position (but for unused places), [m,k] int64.
        log_probs: their log-probabilities (log-weights of drawn columns), [m,k] float32, nats; very small, but finite,
            in unused places.
        tail: log of the mass of all other columns, [m] float32; None for drawn columns, which stand for all of them.
        temperature: of the distribution.
        entropy: of the whole distribution, nats, [m]; None where it is not stored.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor | None
    temperature: float
    entropy: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: slice | Tensor) -> SparseRows:
        tail = None if self.tail is None else self.tail[at]
        entropy = None if self.entropy is None else self.entropy[at]
        return SparseRows(self.ids[at], self.log_probs[at], tail, self.temperature, entropy)


@dataclass
class SparseLogits:
    """A cached teacher: k columns with their log-probabilities at the positions with a target, and traits.

    A whole row is not known. `mtkd.objective.kept` compares what is known with the student, or completes it by that.

    Attributes:
        name: of the teacher, for messages.
        at: row of `values` for every flat position, [B*L] int64; -1 where nothing was stored.
        values: of all stored positions.
        columns: V.
        traits: stored traits by name, each [P] float32.
        text: stored facts of every token by name, each [B,L] float32.
    """

    name: str
    at: Tensor
    values: SparseRows
    columns: int
    traits: dict[str, Tensor]
    text: dict[str, Tensor] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        return self.columns

    def sparse(self, index: Tensor) -> SparseRows:
        """What is known at the flat positions `index` [m].

        Raises:
            DataError: for a position that was not stored.
        """
        return self.values[self._found(index)]

    def trait(self, name: str, index: Tensor) -> Tensor:
        """A trait at the flat positions `index` [m], float32: stored, or read off the most probable columns.

        Those tell the choice exactly (of equally probable columns the first), and at temperature 1, where traits are
        defined, confidence and margin to the rounding of the cache.

        Raises:
            UserError: when the cache does not know it.
        """
        rows = self._found(index)
        if name in self.traits:
            return self.traits[name][rows]
        values = self.values
        if values.tail is not None:
            if name == "choice":
                place = values.log_probs[rows].argmax(-1, keepdim=True)
                return values.ids[rows].gather(-1, place).squeeze(-1).float()
            best = values.log_probs[rows].topk(min(2, values.ids.shape[1]), -1).values
            if name == "confidence" and values.temperature == 1:
                return best[:, 0].exp()
            if name == "margin" and values.temperature == 1 and best.shape[1] == 2:
                return best[:, 0].exp() - best[:, 1].exp()
        raise self._unknown(name)

    def text_fact(self, name: str) -> Tensor:
        """What was stored of every token, [B,L] float32.

        Raises:
            UserError: when the cache does not know it.
        """
        if name not in self.text:
            raise self._unknown(name)
        return self.text[name]

    def _unknown(self, name: str) -> UserError:
        return UserError(
            f"the cache of teacher '{self.name}' does not know the trait '{name}'",
            where="@stage.teachers",
            allowed=sorted({*self.traits, *self.text}) or "none",
            todo="make the cache with this trait, or take a weighting that does not read it",
        )

    def _found(self, index: Tensor) -> Tensor:
        rows = self.at[index]
        why = f"the cache of teacher '{self.name}' has nothing at a position that counts"
        if not free_to_ask(rows):
            torch._assert_async((rows >= 0).all(), why)  # the device stops by itself, nobody waits
        elif bool((rows < 0).any()):
            raise DataError(why, where="@stage.teachers")
        return rows

    def rows(self, index: Tensor) -> Tensor:
        raise UserError(
            f"the cache of teacher '{self.name}' has no whole rows of logits",
            where="@stage.teachers",
            todo="run this teacher instead of its cache where something reads its whole distribution",
        )

    def select(self, columns: Tensor) -> SparseLogits:
        raise UserError(
            f"the cached teacher '{self.name}' cannot be compared with a student of a compressed vocabulary",
            where="@stage.teachers",
            todo="run the teacher itself; its cache knows some columns only",
        )

    def in_dtype(self, dtype: torch.dtype) -> SparseLogits:
        return self


@dataclass
class NoLogits:
    """Stands for the logits of a teacher that gives none. The plan refuses what reads them, so rows are empty."""

    @property
    def num_columns(self) -> int:
        return 0

    def rows(self, index: Tensor) -> Tensor:
        return torch.empty(len(index), 0, device=index.device)  # [n,0]

    def select(self, columns: Tensor) -> NoLogits:
        return self

    def in_dtype(self, dtype: torch.dtype) -> NoLogits:
        return self


Features = dict[str, Tensor | Logits]


def as_logits(value: Tensor | Logits) -> Logits:
    """Logits as the protocol: a tensor [..., C] exists already."""
    return DenseLogits(value) if isinstance(value, Tensor) else value
