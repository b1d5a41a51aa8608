"""The weights of a stage's teachers on a micro-batch: the weighting is called once, and every row reads its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.data.device import moved
from mtkd.engine.jsonlines import WEIGHT
from mtkd.errors import UserError
from mtkd.models.features import Features, Logits, as_logits
from mtkd.models.pieces import Pieces
from mtkd.objective.compile import Row
from mtkd.objective.settings import Wiring
from mtkd.weightings.base import Weighting
from mtkd.weightings.faults import weight_faults
from mtkd.weightings.traits import FACTS, Around, Traits


@dataclass(frozen=True)
class Weights:
    """The result of a weighting for a micro-batch.

    Attributes:
        values: [T,B,L]; L = 1 for one weight per example.
        penalty: what the weighting adds to the loss, [], or None.
        metrics: mean weight of each teacher, mean entropy of the weights (nats), counts of faults.
    """

    values: Tensor
    penalty: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Weigher:
    """Calls a weighting with the traits and facts that it reads.

    Args:
        weighting: a part of the objective, which trains it.
        rows: of the stage; they decide where weights are read.
        teachers: names, in pool order.
        num_layers: of the student, whose last hidden states some facts are made of.
    """

    def __init__(
        self,
        weighting: Weighting,
        rows: Sequence[Row],
        teachers: Sequence[str],
        num_layers: int,
        how: Wiring,
        pieces: Pieces,
    ) -> None:
        self._weighting, self._names, self._how, self._pieces = weighting, tuple(teachers), how, pieces
        facts = [FACTS[name] for name in weighting.may_read() & FACTS.keys()] if teachers else []
        keys = {"logits": "logits", "hidden": f"hidden.{num_layers}"}
        self._features = {name: keys[name] for fact in facts for name in fact.student}
        self._beyond_targets = how.token_level and any(
            row.match.weighted and not row.from_labels and row.counted(True) not in ("targets", "written")
            for row in rows
        )
        self._step, self._gram = 0, torch.zeros(0, 0)
        self._teach = torch.tensor(how.teach, dtype=torch.float32)  # [D+1,T]

    @property
    def student_wants(self) -> frozenset[str]:
        """Feature keys that the facts ask of the student."""
        return frozenset(self._features.values())

    def begin_step(self, step: int, gram: Tensor | None) -> None:
        """Keep what the micro-batches of a step share: its number, and the Gram matrix [T,T] where it is read."""
        self._step = step
        if gram is not None:
            self._gram = gram

    def weights(self, batch: Batch, logits: Sequence[Logits], student: Features, counts: Mapping[str, int]) -> Weights:
        """Call the weighting.

        Args:
            batch: with targets that number the student's columns.
            logits: of the teachers.
            student: its features.
            counts: global numbers of positions of the step.

        Raises:
            UserError: weights of another shape, or a name that the weighting does not declare.
        """
        if not logits:
            return Weights(torch.zeros(0, len(batch.keys), 1, device=batch.input_ids.device))
        # Facts are detached: no gradient reaches student or teachers through the weights.
        around = self._around(batch, student, counts)
        traits = Traits(logits, around, self._how.per, self._how.tile, self._pieces, self._weighting.may_read())
        values = self._weighting(traits)
        if values.shape == (*traits.shape[:2], 1):
            values = values.expand(traits.shape)  # one weight per example is the same at all its tokens
        if values.shape != traits.shape:
            raise UserError(
                f"weighting '{type(self._weighting).__name__}' gives weights of another shape",
                where="@stage.weighting",
                found=list(values.shape),
                allowed=f"{list(traits.shape)}: teachers, examples, and tokens or 1",
            )
        if self._how.teach:
            values = self._in_domains(values, batch)
        read = batch.real[:, None]  # [B,1] or [B,L]
        if self._how.weights_per_token:
            read = batch.token_mask if self._beyond_targets else batch.target_mask
        # Counted on the device and read with the metrics: asking for a bool here would make every step wait.
        faults = weight_faults(values.detach(), read, sound=traits.sound)
        metrics = {**self._means(values, batch, counts), **faults}
        return Weights(values, self._weighting.penalty(traits), metrics)

    def _in_domains(self, values: Tensor, batch: Batch) -> Tensor:
        """The weights of the teachers of each text's domain, [T,B,L]; 0 for the others.

        Where a weighting's weights sum to 1, those that are left do so again: what `softmax` gives among them. Where
        all of them are 0 (`drop` left out the only one), they are equal.
        """
        assert batch.routes is not None
        teach = moved(self._teach, values.device)[batch.routes].T[..., None]  # [T,B,1]; filler rows have the last one
        kept = values * teach
        if not self._weighting.sums_to_one:
            return kept
        left, whole = kept.sum(0), values.sum(0)  # [B,L]
        none = left == 0
        shares = torch.where(none, teach / teach.sum(0), kept / left.masked_fill(none, 1))
        return shares * whole

    @torch.no_grad()
    def _around(self, batch: Batch, student: Features, counts: Mapping[str, int]) -> Around:
        """The sources of the weighting's facts."""
        batch, tokens = self._read_batch(batch)
        features = {name: student[key] for name, key in self._features.items()}
        if "logits" in features:
            features["logits"] = as_logits(features["logits"]).in_dtype(self._how.dtype)
        return Around(batch, counts, self._step, features, self._gram, tokens)

    def _read_batch(self, batch: Batch) -> tuple[Batch, Tensor | None]:
        """The batch as the weighting reads it, and `Around.tokens`.

        What the student wrote is no label: rows of it are examples without targets to a weighting that needs labels,
        whose traits then exist at all tokens.
        """
        if batch.written is None or not self._weighting.needs_labels:
            return batch, batch.token_mask if self._beyond_targets else None
        return batch.labelled(), batch.token_mask

    def _means(self, values: Tensor, batch: Batch, counts: Mapping[str, int]) -> dict[str, Tensor]:
        """Mean weight per teacher and mean entropy of the normalised weights (nats)."""
        per_token = self._how.weights_per_token
        mask = batch.target_mask if per_token else batch.real[:, None]  # [B,L] or [B,1]
        count = max(counts["targets" if per_token else "sequences"], 1)
        counted = values.detach() * mask  # [T,B,L]
        # Absolute: negative weights may be declared, and a share must not be. 1e-30 only avoids 0/0.
        shares = counted.abs() / counted.abs().sum(0).clamp_min(1e-30)
        entropy = -torch.special.xlogy(shares, shares).sum()
        means = counted.sum((1, 2)) / count  # [T]
        metrics = {WEIGHT + n: m for n, m in zip(self._names, means.unbind(), strict=True)}
        return {**metrics, "weight_entropy": entropy / count}

    def of_sequences(self, values: Tensor, batch: Batch) -> Tensor:
        """Weights for rows over sequences, [T,B,1]: of token weights the mean over targets, or tokens without any."""
        if not self._how.weights_per_token:
            return values
        mask = batch.target_mask
        mask = mask | (batch.token_mask & ~mask.any(-1, keepdim=True))  # [B,L]
        return (values * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)
