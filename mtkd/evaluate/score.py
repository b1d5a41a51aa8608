"""Per-example scores of a model, or of several as one uniform mixture: everything reported starts from these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.data.load import LoadedData
from mtkd.data.split import Split
from mtkd.engine.dist import Dist, alive
from mtkd.models.features import Logits, as_logits
from mtkd.models.forward import LOGITS, logits_of
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import VocabularyMap
from mtkd.pool import Teacher

Records = list[dict[str, Any]]
Reader = TappedModel | Teacher
"""What is scored: a model that a stage trained, or a teacher."""


@dataclass(frozen=True)
class Scorer:
    """Scores models on one rank.

    Attributes:
        device, dtype: where models run, and in what (bfloat16: under autocast).
        tile: positions whose logits exist at one time.
        whole_head: gathers a sharded output head; entered after the forward pass, whose own end shards it again.
    """

    device: torch.device
    dtype: torch.dtype
    dist: Dist
    tile: int
    whole_head: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def log_probs(self, models: Sequence[Reader], batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles (flat positions [m], log of the models' mean probability [m,V]) over the batch's targets.

        A regression model (one column) gives its mean output instead of a log-probability.
        """
        values = [self._logits(model, batch) for model in models]
        alive()
        index = batch.target_mask.reshape(-1).nonzero().squeeze(-1)  # [n]
        with self.whole_head():
            logits = [value.in_dtype(self.dtype) for value in values]
            for positions in index.split(self.tile):
                if batch.targets.is_floating_point():
                    yield positions, torch.stack([x.rows(positions) for x in logits]).mean(0)
                else:
                    logs = [torch.log_softmax(x.rows(positions), -1) for x in logits]  # T of [m,V]
                    mixed = logs[0] if len(logs) == 1 else torch.stack(logs).logsumexp(0) - math.log(len(logs))
                    yield positions, mixed

    def _logits(self, model: Reader, batch: Batch) -> Logits:
        if isinstance(model, TappedModel):
            return logits_of(model, batch, self.dtype)
        return as_logits(model.forward(batch.read_by(model.view), LOGITS)["logits"])

    def mean_loss(self, model: TappedModel, batches: Iterable[Batch]) -> float:
        """Mean negative log-likelihood (nats per target) or squared error over all ranks' batches. A collective."""
        total, count = 0.0, 0.0
        vocabulary = model.vocabulary if model.token_level else None
        for batch in batches:
            batch = batch.to(self.device)
            targets = batch.targets.reshape(-1)
            for positions, values in self.log_probs([model], batch):
                total += float(_losses(values, targets[positions], vocabulary).sum())
                count += len(positions)
        total, count = self.dist.sum([total, count])
        return total / max(count, 1)

    def records(
        self, models: Sequence[Reader], data: LoadedData, split: Split, batches: Iterable[Batch]
    ) -> Records | None:
        """A record per document (token tasks) or example (classification), in the split's order, on the main rank.

        Several models are scored as one uniform mixture. Token tasks: {document, domain, nll (nats, summed), tokens
        (targets), bytes, correct (argmax hits)}. A model with a compressed vocabulary has `removed` too (targets
        without a column of their own), and its nll is that of the ids themselves: class by the model, id within the
        class by its share of the counts (see `mtkd.models.vocabulary`). Classification: {document, label, prediction,
        probabilities}; regression: {document, label, prediction}. A collective.
        """
        score = self._documents if data.task.token_level else self._examples
        return score(models, split, batches)

    def _documents(self, models: Sequence[Reader], split: Split, batches: Iterable[Batch]) -> Records | None:
        sums = np.zeros((4, len(split.document_names)))  # nll, targets, correct, removed
        vocabulary = _common_vocabulary(models)
        for batch in batches:
            batch = batch.to(self.device)
            targets = batch.targets.reshape(-1)
            assert batch.origin is not None, "a split made it"
            origin = batch.origin.cpu().numpy()
            for positions, log_probs in self.log_probs(models, batch):
                labels = targets[positions]
                rows = (positions // batch.targets.shape[1]).cpu().numpy()
                documents = origin[rows]
                np.add.at(sums[0], documents, _losses(log_probs, labels, vocabulary).double().cpu().numpy())
                np.add.at(sums[1], documents, 1)
                best = log_probs.argmax(-1)
                if vocabulary is not None:  # a column speaks for its kept id: a removed one is never right
                    best = vocabulary.kept[best]
                    np.add.at(sums[3], documents, vocabulary.is_removed(labels).double().cpu().numpy())
                np.add.at(sums[2], documents, (best == labels).double().cpu().numpy())
        nll, tokens, correct, removed = np.array(self.dist.sum(sums.reshape(-1).tolist())).reshape(4, -1)
        if not self.dist.is_main:
            return None
        return [
            {
                "document": name,
                "domain": split.document_domains[i],
                "nll": float(nll[i]),
                "tokens": int(tokens[i]),
                "bytes": int(split.document_bytes[i]),
                "correct": int(correct[i]),
                **({} if vocabulary is None else {"removed": int(removed[i])}),
            }
            for i, name in enumerate(split.document_names)
            if tokens[i] > 0
        ]

    def _examples(self, models: Sequence[Reader], split: Split, batches: Iterable[Batch]) -> Records | None:
        records: dict[int, dict[str, Any]] = {}
        for batch in batches:
            batch = batch.to(self.device)
            assert batch.origin is not None, "a split made it"
            for positions, values in self.log_probs(models, batch):
                for row, value in zip(positions.tolist(), values.cpu(), strict=True):
                    record = _example_record(split, int(batch.origin[row]), batch.targets[row], value)
                    records[int(batch.keys[row])] = record
        gathered = self.dist.gather_objects(records)
        if gathered is None:
            return None
        merged = {example: record for part in gathered for example, record in part.items()}
        return [merged[example] for example in sorted(merged)]


def _example_record(split: Split, document: int, label: Tensor, value: Tensor) -> dict[str, Any]:
    """The record of one example.

    Args:
        label: [] of any kind.
        value: log-probabilities of the classes [C], or the output of a regression [1].
    """
    record: dict[str, Any] = {"document": split.document_names[document]}
    if split.document_domains[document]:  # names may be unique within a domain only
        record["domain"] = split.document_domains[document]
    record["label"] = label.item()
    if label.is_floating_point():
        return {**record, "prediction": float(value[0])}
    return {
        **record,
        "prediction": int(value.argmax()),
        "probabilities": [round(p, 6) for p in value.exp().tolist()],
    }


def _common_vocabulary(models: Sequence[Reader]) -> VocabularyMap | None:
    """That of the only model; a mixture at token level has whole vocabularies (teachers, which must have one)."""
    vocabulary = models[0].vocabulary if isinstance(models[0], TappedModel) else None
    assert vocabulary is None or len(models) == 1
    return vocabulary


def _losses(values: Tensor, labels: Tensor, vocabulary: VocabularyMap | None = None) -> Tensor:
    """Squared error, or negative log-likelihood (nats) of labels; of run ids where the vocabulary is compressed."""
    if labels.is_floating_point():
        return (values.squeeze(-1) - labels).square()
    if vocabulary is not None:
        return _losses(values, vocabulary.targets(labels)) - vocabulary.log_share(labels)
    return -values.gather(-1, labels[:, None]).squeeze(-1)
