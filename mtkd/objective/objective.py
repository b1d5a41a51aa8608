"""The objective: student, width adapters and weighting in one module whose forward returns the loss.

One module means one optimizer, one gradient clipping, one checkpoint, and a DeepSpeed engine that sees everything that
trains. Every row becomes per-position losses, is weighted per teacher, and is divided once by the *global* number of
valid positions of its kind, so micro-batches and ranks add up to the same gradient however the batch is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.engine.base import Trainable
from mtkd.engine.jsonlines import ROW, WEIGHT
from mtkd.errors import UserError
from mtkd.models.features import Features, HeadLogits, Logits, as_logits
from mtkd.models.forward import LOGITS, features_of
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses
from mtkd.objective.projection import projection_key
from mtkd.objective.targets import passes_for, positions_of
from mtkd.objective.tiles import tiled
from mtkd.weightings.base import Weighting
from mtkd.weightings.faults import weight_faults
from mtkd.weightings.traits import FACTS, Around, Traits

Counts = Mapping[str, int]


class Objective(Trainable):
    """Student + projections + weighting; `forward` gives the loss and its metrics.

    Args:
        student: the model that trains, with taps.
        rows: the compiled rows of the stage.
        weighting: how much each teacher counts; ignored by rows with ``weighted: false``.
        projections: from `make_projections`.
        teachers: names, in pool order.
        per: "example" or "token" weights.
        token_level: targets are [B,L], logits are vocabulary-size.
        tile: positions per tile.
        dtype: of the matrix products: bfloat16 runs the student under autocast; losses stay float32.
        pieces: how positions are cut into tiles; a plan makes fewer.
    """

    def __init__(
        self,
        student: TappedModel,
        rows: Sequence[Row],
        weighting: Weighting,
        projections: nn.ModuleDict,
        teachers: Sequence[str],
        *,
        per: str = "example",
        token_level: bool,
        tile: int = 256,
        dtype: torch.dtype = torch.float32,
        pieces: Pieces = EVERY_PIECE,
    ) -> None:
        super().__init__()
        self.student, self.weighting, self.projections = student, weighting, projections
        self.rows, self.teacher_names = list(rows), tuple(teachers)
        self.per, self.token_level, self.tile, self.dtype = per, token_level, tile, dtype
        self.pieces = pieces
        self.student_wants = frozenset().union(*(row.student_wants() for row in self.rows))
        facts = [FACTS[name] for name in weighting.reads & FACTS.keys()] if teachers else []
        keys = {"logits": "logits", "hidden": f"hidden.{student.info.num_layers}"}
        self._facts_want = {name: keys[name] for fact in facts for name in fact.student}
        self.student_wants |= frozenset(self._facts_want.values())
        self.step, self.gram = 0, torch.zeros(0, 0)  # set by `begin_step`
        self._faults: dict[str, Tensor] = {}  # of the last micro-batch's weights
        self.logit_rows = [row for row in self.rows if row.is_logits]
        self._beyond_targets = token_level and any(
            row.match.weighted and not row.from_labels and row.counted(True) != "targets" for row in self.rows
        )

    @property
    def models(self) -> dict[str, TappedModel]:
        return {"student": self.student}

    @property
    def _per_token(self) -> bool:
        """Not to be read off the weights: a micro-batch of one-token sequences has L = 1 either way."""
        return self.per == "token" and self.token_level

    def teacher_wants(self, k: int) -> frozenset[str]:
        """Feature keys asked of teacher k. Its logits are always among them: they cost nothing until they are read."""
        return LOGITS.union(*(row.teacher_wants(k) for row in self.rows))

    def outside_parameters(self) -> list[nn.Parameter]:
        return [*super().outside_parameters(), *self.weighting.parameters()]

    def own_rates(self) -> dict[int, float]:
        rate = self.weighting.lr
        return {} if rate is None else {id(p): rate for p in self.weighting.parameters()}

    def step_counts(self, batch: Batch) -> Mapping[str, int]:
        return self.weighting.counts(batch)

    def begin_step(self, step: int, gram: Tensor | None = None) -> None:
        """What the micro-batches of an optimizer step share: its number from 0, and the Gram matrix if it is read."""
        self.step = step
        if gram is not None:
            self.gram = gram

    def forward(
        self, batch: Batch, teachers: list[Features], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch.

        Args:
            batch: a micro-batch of B sequences.
            teachers: features of each teacher on this batch.
            counts: global numbers of `tokens`, `targets` and `sequences` in the whole optimizer step, and those that
                the weighting counts.
        Returns:
            (loss [], metrics): summed over the micro-batches and ranks of a step, both are the step's values.
        """
        features = features_of(self.student, batch, self.student_wants, self.dtype)
        batch, logits = self.mapped(batch), self.teacher_logits(teachers)
        weights, penalty = self._weights(batch, logits, features, counts)
        metrics = {**self._weight_metrics(weights, batch, counts), **self._faults}
        total = torch.zeros((), device=batch.input_ids.device)
        for position, row in enumerate(self.rows):
            if not row.is_logits:
                if row.match.feature == "nsp_logits":
                    found = self._next_sentence_row(row, features, teachers, weights, batch)
                else:
                    found = self._dense_row(row, position, features, teachers, weights, batch)
                value = found / self._count(row, counts)
                total = total + row.match.weight * value
                metrics[ROW + row.key] = value.detach()
        if self.logit_rows:
            loss, values = self._logit_rows(features["logits"], logits, weights, batch, counts)
            total = total + loss
            for row, value in zip(self.logit_rows, values.unbind(), strict=True):
                metrics[ROW + row.key] = value
        if penalty is not None:
            total = total + penalty
            metrics["penalty"] = penalty.detach()
        metrics["loss"] = total.detach()
        return total, metrics

    def mapped(self, batch: Batch) -> Batch:
        """The batch with targets that number the student's columns: others than the run's ids where it has fewer."""
        vocabulary = self.student.vocabulary
        if vocabulary is None or not self.token_level:
            return batch
        return replace(batch, targets=vocabulary.targets(batch.targets))

    def teacher_logits(self, teachers: Sequence[Features]) -> list[Logits]:
        """The teachers' logits over the student's columns, cast once for the weights and the rows together."""
        logits = [as_logits(teacher["logits"]) for teacher in teachers]
        vocabulary = self.student.vocabulary
        if vocabulary is not None and self.token_level:
            logits = [x.select(vocabulary.kept) for x in logits]
        return [x.in_dtype(self.dtype) for x in logits]

    def _count(self, row: Row, counts: Counts) -> int:
        return max(counts[row.counted(self.token_level)], 1)

    def _weights(
        self, batch: Batch, logits: Sequence[Logits], student: Features, counts: Counts
    ) -> tuple[Tensor, Tensor | None]:
        """([T,B,L], L = 1 for one weight per example; what the weighting adds to the loss).

        Raises:
            UserError: weights of another shape.
        """
        if not logits:
            return torch.zeros(0, len(batch.keys), 1, device=batch.input_ids.device), None
        around = self._around(batch, student, counts)
        traits = Traits(logits, around, self.per, self.tile, self.pieces, self.weighting.reads)
        weights = self.weighting(traits)
        if weights.shape == (*traits.shape[:2], 1):
            weights = weights.expand(traits.shape)  # one weight per example is the same at all its tokens
        if weights.shape != traits.shape:
            raise UserError(
                f"weighting '{type(self.weighting).__name__}' gives weights of another shape",
                where="@stage.weighting",
                found=list(weights.shape),
                allowed=f"{list(traits.shape)}: teachers, examples, and tokens or 1",
            )
        read = batch.real[:, None]
        if self._per_token:
            read = batch.token_mask if self._beyond_targets else batch.target_mask
        self._faults = weight_faults(weights.detach(), read, sound=traits.sound)
        return weights, self.weighting.penalty(traits)

    @torch.no_grad()
    def _around(self, batch: Batch, student: Features, counts: Counts) -> Around:
        """What the weighting's facts are made of."""
        features = {name: student[key] for name, key in self._facts_want.items()}
        if "logits" in features:
            features["logits"] = as_logits(features["logits"]).in_dtype(self.dtype)
        tokens = batch.token_mask if self._beyond_targets else None
        return Around(batch, counts, self.step, features, self.gram, tokens)

    def _weight_metrics(self, weights: Tensor, batch: Batch, counts: Counts) -> dict[str, Tensor]:
        """Mean weight per teacher and mean entropy of the normalised weights (nats)."""
        if not len(weights):
            return {}
        per_token = self._per_token
        mask = batch.target_mask if per_token else batch.real[:, None]
        count = max(counts["targets" if per_token else "sequences"], 1)
        held = weights.detach() * mask
        shares = held.abs() / held.abs().sum(0).clamp_min(1e-30)
        entropy = -torch.special.xlogy(shares, shares).sum()
        means = held.sum((1, 2)) / count
        metrics = {WEIGHT + n: m for n, m in zip(self.teacher_names, means.unbind(), strict=True)}
        return {**metrics, "weight_entropy": entropy / count}

    def _dense_row(
        self,
        row: Row,
        position: int,
        student: Features,
        teachers: Sequence[Features],
        weights: Tensor,
        batch: Batch,
    ) -> Tensor:
        """Sum over valid positions, layer pairs and weighted teachers of a row on hidden states or attention, []."""
        whole = row.counted(self.token_level) == "sequences"
        mask = batch.real if whole else batch.token_mask
        weights = self._of_sequences(weights, batch) if whole else weights
        total = torch.zeros((), device=mask.device)
        for k, teacher in enumerate(teachers):
            weight = weights[k] if row.match.weighted else None
            for pair, (student_layer, teacher_layer) in enumerate(row.pairs[k]):
                ours, theirs = student[row.feature_key(student_layer)], teacher[row.feature_key(teacher_layer)]
                assert isinstance(ours, Tensor)
                assert isinstance(theirs, Tensor)
                key = projection_key(row, position, k, pair)
                if key in self.projections:
                    ours = self.projections[key](ours.float())
                values = row.spec(ours, theirs, mask, row.match.options)
                if weight is not None:
                    values = values * (weight if values.dim() == 2 else weight[:, 0])
                share = len(row.pairs[k]) if row.match.layer_reduction == "mean" else 1
                total = total + values.sum() / share
        return total

    def _next_sentence_row(
        self, row: Row, student: Features, teachers: Sequence[Features], weights: Tensor, batch: Batch
    ) -> Tensor:
        """Sum over sequences of a row on next-sentence logits, []."""
        index = batch.real.nonzero().squeeze(-1)
        ours = as_logits(student["nsp_logits"]).rows(index)
        if row.from_labels:
            assert batch.nsp_targets is not None, "the task says that there are next-sentence labels"
            return row.spec(ours, batch.nsp_targets[index], None, row.match.options).sum()
        theirs = [as_logits(teacher["nsp_logits"]).rows(index) for teacher in teachers]
        return ensemble_losses(row, ours, theirs, self._of_sequences(weights, batch)[:, index, 0], None).sum()

    def _of_sequences(self, weights: Tensor, batch: Batch) -> Tensor:
        """Weights for rows over sequences, [T,B,1]: of token weights the mean over targets, or tokens without any."""
        if not self._per_token:
            return weights
        mask = batch.target_mask
        mask = mask | (batch.token_mask & ~mask.any(-1, keepdim=True))
        return (weights * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp_min(1)

    def _logit_rows(
        self, student: Tensor | Logits, logits: Sequence[Logits], weights: Tensor, batch: Batch, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """All logits rows in one pass: tiled over a vocabulary, whole over classes. (loss [], row values [R])."""
        positions = positions_of(self.logit_rows, batch, self.token_level)
        spread = weights.expand(-1, -1, batch.targets.shape[1]) if self.token_level else weights  # [T,B,L]
        at_positions = spread.flatten(1)[:, positions.index]  # [T,n]
        head = as_logits(student)
        in_tiles = isinstance(head, HeadLogits)
        first, *more = passes_for(
            self.logit_rows,
            [self._count(row, counts) for row in self.logit_rows],
            logits,
            positions,
            at_positions,
            token_level=self.token_level,
            size=self.tile,
            pieces=self.pieces if in_tiles else None,
        )
        if not isinstance(head, HeadLogits):
            return first(head.rows(positions.index), at_positions, slice(0, len(positions.index)))
        tile, dtype, pieces = self.tile, self.dtype, self.pieces
        return tiled(head, positions.index, at_positions, first, tile=tile, dtype=dtype, more=more, pieces=pieces)
