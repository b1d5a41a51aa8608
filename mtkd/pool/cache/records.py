"""One example's part of a cache: how it is made of a teacher's features, and how it becomes features again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.data.device import moved
from mtkd.errors import DataError
from mtkd.models.features import DenseLogits, Features, Logits, SparseLogits, SparseRows, split_key
from mtkd.pool.cache.content import PER_EXAMPLE, CacheContent
from mtkd.weightings.draws import uniform
from mtkd.weightings.facts import text_log_probs
from mtkd.weightings.traits import TRAITS

Arrays = dict[str, np.ndarray]


@dataclass
class Record:
    """What is stored of one example.

    Attributes:
        id: its number in the split.
        tokens: its unpadded length.
        positions: n, positions with a prediction target; 1 for classes.
        targets: ``top``: ids [n,k], log_probs [n,k], tail [n]; ``sampled``: ids, counts and importance [n,u], and
            entropy [n], of the distribution at the cache's temperature.
        traits: [n] each; [tokens] of `TEXT_TRAITS`.
        classes: class logits, then those that mean none of them, [C+R].
        hidden: [tokens,H], or [H] for features per example.
    """

    id: int
    tokens: int
    positions: int
    targets: Arrays = field(default_factory=dict)
    traits: Arrays = field(default_factory=dict)
    classes: np.ndarray | None = None
    hidden: dict[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def make_records(content: CacheContent, batch: Batch, features: Features, tile: int = 256) -> list[Record]:
    """The records of a batch's examples, filler rows left out.

    A draw depends on the seed, the example's number and the place of the position only, not on the batch around it.

    Args:
        features: a teacher's, with ``logits`` and the content's hidden keys.
        tile: positions whose whole rows of logits exist at one time.
    """
    rows = batch.real.nonzero().squeeze(-1).tolist()
    token_level = batch.targets.dim() == 2
    mask = batch.target_mask if token_level else batch.real
    counts = (mask.sum(1) if token_level else mask.long()).tolist()
    records = [
        Record(int(batch.keys[row]), int(batch.attention_mask[row].sum()), counts[row], hidden={}) for row in rows
    ]
    whole = features["logits"]
    logits = DenseLogits(whole) if isinstance(whole, Tensor) else whole
    if content.per_token or content.stored_traits:
        _put_positions(content, records, batch, logits, tile)
    index = torch.arange(len(batch.keys), device=batch.keys.device)
    of_text = text_log_probs(logits, batch, tile) if content.text_traits else batch.attention_mask  # [B,L]
    for record, row in zip(records, rows, strict=True):
        record.traits |= {name: _numpy(of_text[row][batch.attention_mask[row]]) for name in content.text_traits}
        if content.targets == "classes":
            record.classes = _class_logits(logits, index[row], content).cpu().numpy()
        for key in content.hidden:
            value = features[key]
            assert isinstance(value, Tensor), "of logits a cache keeps what its targets say"
            row_value = value[row] if split_key(key)[0] in PER_EXAMPLE else value[row][batch.attention_mask[row]]
            record.hidden[key] = row_value.to(getattr(torch, content.dtype)).cpu()
    return records


def _class_logits(logits: Logits, row: Tensor, content: CacheContent) -> Tensor:
    """The logits of an example's classes, then those of the outputs that mean none of them, [C+R] float32.

    Args:
        row: its place in the batch, [].
    """
    classes = logits.rows(row[None])[0].float()
    other = logits.other if isinstance(logits, DenseLogits) else None
    others = classes[:0] if other is None else other[row].float()
    assert len(others) == content.others, "the plan counts the outputs; a wrapper of the logits may hide them"
    return torch.cat([classes, others])


def _put_positions(content: CacheContent, records: list[Record], batch: Batch, logits: Logits, tile: int) -> None:
    """Targets and traits of all positions of the batch, computed a tile at a time, handed to their records."""
    mask = batch.target_mask if batch.targets.dim() == 2 else batch.real
    index = mask.reshape(-1).nonzero().squeeze(-1)
    counts = [record.positions for record in records]
    owners = np.repeat([record.id for record in records], counts)
    places = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, np.int64)])
    labels = batch.targets.reshape(-1)[index]
    parts: list[tuple[Arrays, Arrays]] = []
    for start in range(0, max(len(index), 1), tile):
        at = slice(start, start + tile)
        values = logits.rows(index[at])
        asked = (name for name in content.stored_traits if name not in content.text_traits)
        traits = {name: _numpy(TRAITS[name](values, labels[at])) for name in asked}
        targets: Arrays = {}
        if content.targets == "top":
            targets = _top(content, values)
        elif content.targets == "sampled":
            targets = _sampled(content, values, owners[at], places[at])
        parts.append((targets, traits))
    ends = np.cumsum([0, *counts])
    for side, name in ((0, "targets"), (1, "traits")):
        whole = _concatenated([part[side] for part in parts])
        for record, start, end in zip(records, ends[:-1], ends[1:], strict=True):
            setattr(record, name, {key: value[start:end] for key, value in whole.items()})


def _top(content: CacheContent, logits: Tensor) -> Arrays:
    log_probs = torch.log_softmax(logits.float() / content.temperature, -1)
    best, ids = log_probs.topk(content.k, -1)
    others = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    return {"ids": _numpy(ids), "log_probs": _numpy(best), "tail": _numpy(others)}


def _sampled(content: CacheContent, logits: Tensor, owners: np.ndarray, places: np.ndarray) -> Arrays:
    """k draws with replacement by the inverse of the proposal's distribution function.

    Each drawn column weighs ``count / k * p / q``: the mean over draws is p, so the gradient of the cross entropy,
    ``sum_v w(v) p_S - w``, is right in the mean.

    Source: Anshumann et al. 2025, Sparse Logit Sampling, arXiv 2503.16870 (random sampling knowledge distillation).
    """
    log_p = torch.log_softmax(logits.double() / content.temperature, -1)
    log_q = log_p if content.proposal == 1 else torch.log_softmax(log_p / content.proposal, -1)
    below = log_q.exp().cumsum(-1)
    numbers = uniform(content.seed, owners[:, None], places[:, None], np.arange(content.k)[None])
    points = torch.from_numpy(numbers).to(below.device) * below[:, -1:]
    ids = torch.searchsorted(below, points, right=True).clamp_max(content.columns - 1).sort(-1).values
    importance = (log_p - log_q).gather(-1, ids)
    entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
    drawn, ratios = _numpy(ids), _numpy(importance)
    first = np.ones(drawn.shape, bool)
    first[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    group = np.cumsum(first, 1) - 1  # number of the distinct id that a draw belongs to
    counts = np.zeros(drawn.shape, np.int64)
    np.add.at(counts, (np.arange(len(drawn))[:, None], group), 1)
    distinct, ratio = np.zeros_like(drawn), np.zeros(drawn.shape)
    np.put_along_axis(distinct, group, drawn, 1)
    np.put_along_axis(ratio, group, ratios, 1)
    return {"ids": distinct, "counts": counts, "importance": ratio, "entropy": _numpy(entropy).astype(np.float32)}


@dataclass
class Records:
    """The records of some examples, in the order that they were asked for.

    Attributes:
        ids: their numbers, [E]; -1 for filler rows, of which nothing is stored.
        tokens, positions: per example, [E] int64.
        values: targets of all positions, one example after another; None without token targets.
        traits: stored traits, [P] each; [sum of tokens] of `TEXT_TRAITS`.
        classes: class logits, then those that mean none of them, [E,C+R], zeros in filler rows; None without them.
        hidden: per token [sum of tokens,H], per example [E,H] (zeros in filler rows).
    """

    content: CacheContent
    ids: tuple[int, ...]
    tokens: Tensor
    positions: Tensor
    values: SparseRows | None
    traits: dict[str, Tensor]
    classes: Tensor | None
    hidden: Mapping[str, Tensor]
    where: str

    def features(self, name: str, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features of a batch whose `ids` these records were read for, on its device.

        Raises:
            DataError: when a feature was not stored, or an example has other lengths than when it was.
        """
        features: Features = {}
        for key in sorted(wants):
            if key == "logits":
                features[key] = self.logits(name, batch)
            else:
                features[key] = self._feature(key, batch)
        return features

    def logits(self, name: str, batch: Batch) -> Logits:
        """Class logits, or what is known at the batch's targets.

        Raises:
            DataError: an example has another number of tokens, or of targets, than when it was stored.
        """
        device = batch.keys.device
        self._same(batch.on_host.token_mask.sum(1).cpu(), self.tokens, "tokens")
        if self.classes is not None:
            classes, columns = moved(self.classes, device), self.content.columns
            return DenseLogits(classes[:, :columns], classes[:, columns:] if self.content.others else None)
        mask = batch.on_host.target_mask
        self._same(mask.sum(1).cpu(), self.positions, "positions to predict")
        at = moved(torch.where(mask.reshape(-1), mask.reshape(-1).cumsum(0) - 1, -1), device)
        values = self.values
        assert values is not None, "caches hold class logits or targets of tokens"
        tail = None if values.tail is None else moved(values.tail, device)
        entropy = None if values.entropy is None else moved(values.entropy, device)
        ids, log_probs = moved(values.ids, device), moved(values.log_probs, device)
        values = SparseRows(ids, log_probs, tail, values.temperature, entropy)
        text = {key: self._spread(moved(self.traits[key], device), batch) for key in self.content.text_traits}
        traits = {key: moved(value, device) for key, value in self.traits.items() if key not in text}
        return SparseLogits(name, at, values, self.content.columns, traits, text)

    def _feature(self, key: str, batch: Batch) -> Tensor:
        if key not in self.hidden:
            raise DataError(
                f"feature '{key}' was not stored",
                where=self.where,
                allowed=self.content.hidden or "none",
                todo="make the cache with this feature, or run the teacher itself",
            )
        values = moved(self.hidden[key], batch.keys.device)
        if split_key(key)[0] in PER_EXAMPLE:
            return values.float()
        self._same(batch.on_host.token_mask.sum(1).cpu(), self.tokens, "tokens")
        return self._spread(values.float(), batch)

    @staticmethod
    def _spread(values: Tensor, batch: Batch) -> Tensor:
        """Values of all tokens, one example after another [N,...], at their places [B,L,...]; 0 at padding."""
        shape, rest = batch.attention_mask.shape, values.shape[1:]
        whole = values.new_zeros(shape.numel(), *rest)
        whole[batch.where(lambda rows: rows.token_mask)] = values
        return whole.view(*shape, *rest)

    def _same(self, counts: Tensor, stored: Tensor, what: str) -> None:
        if not torch.equal(counts, stored):
            row = int((counts != stored).nonzero()[0])
            raise DataError(
                f"example {self.ids[row]} has another number of {what} than when the cache was made",
                where=self.where,
                found=int(counts[row]),
                allowed=int(stored[row]),
            )


def _numpy(values: Tensor) -> np.ndarray:
    return values.cpu().numpy()


def _concatenated(parts: list[Arrays]) -> Arrays:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]} if parts else {}
