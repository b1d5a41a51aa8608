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
from mtkd.engine.jsonlines import ROW, TEACHABLE
from mtkd.models.features import Features, HeadLogits, Logits, NoLogits, as_logits
from mtkd.models.forward import LOGITS, features_of
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import Row
from mtkd.objective.dense import inner_row, next_sentence_row
from mtkd.objective.settings import Wiring
from mtkd.objective.targets import passes_for, positions_of
from mtkd.objective.tiles import tiled
from mtkd.objective.weigh import Weigher
from mtkd.weightings.base import Weighting

Counts = Mapping[str, int]


class Objective(Trainable):
    """Student + projections + weighting; `forward` gives the loss and its metrics.

    Args:
        student: the model that trains, with taps.
        rows: the compiled rows of the stage.
        weighting: how much each teacher counts; ignored by rows with ``weighted: false``.
        projections: from `make_projections`.
        teachers: names, in pool order.
        pieces: how positions are cut into tiles; a plan makes fewer.
    """

    def __init__(
        self,
        student: TappedModel,
        rows: Sequence[Row],
        weighting: Weighting,
        projections: nn.ModuleDict,
        teachers: Sequence[str],
        how: Wiring,
        pieces: Pieces = EVERY_PIECE,
    ) -> None:
        super().__init__()
        self.student, self.weighting, self.projections = student, weighting, projections
        self.rows, self.teacher_names, self.pieces = list(rows), tuple(teachers), pieces
        self.token_level, self.tile, self.dtype = how.token_level, how.tile, how.dtype
        # The weigher is no module: the weighting's parameters have one name in a checkpoint.
        self.weigher = Weigher(weighting, self.rows, teachers, student.info.num_layers, how, pieces)
        wants = (row.student_wants() for row in self.rows)
        self.student_wants = self.weigher.student_wants.union(*wants)
        self._logit_rows = [row for row in self.rows if row.is_logits]

    @property
    def models(self) -> dict[str, TappedModel]:
        return {"student": self.student}

    def teacher_wants(self, k: int, *, has_logits: bool = True) -> frozenset[str]:
        """Feature keys asked of teacher k. Its logits are among them where it has any: unread they cost nothing."""
        always = LOGITS if has_logits else frozenset()
        return always.union(*(row.teacher_wants(k) for row in self.rows))

    def outside_parameters(self) -> list[nn.Parameter]:
        return [*super().outside_parameters(), *self.weighting.parameters()]

    def own_rates(self) -> dict[int, float]:
        rate = self.weighting.lr
        return {} if rate is None else {id(p): rate for p in self.weighting.parameters()}

    def step_counts(self, batch: Batch) -> Mapping[str, int]:
        return self.weighting.counts(batch.labelled() if self.weighting.needs_labels else batch)

    def begin_step(self, step: int, gram: Tensor | None = None) -> None:
        """Say what the micro-batches of an optimizer step share.

        Args:
            step: its number, from 0.
            gram: of the teachers' gradients, [T,T], where it is read.
        """
        self.weigher.begin_step(step, gram)

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
        # One forward pass for all rows: what no row and no fact asks for is not kept.
        features = features_of(self.student, batch, self.student_wants, self.dtype)
        batch, logits = self.mapped(batch), self.teacher_logits(teachers)
        weights = self.weigher.weights(batch, logits, features, counts)
        metrics = dict(weights.metrics)
        # float32 under autocast, too: a bfloat16 sum of ten rows would lose the small ones.
        total = torch.zeros((), device=batch.input_ids.device)
        for position, row in enumerate(self.rows):
            if not row.is_logits:
                value = self._whole_row(row, position, features, teachers, weights.values, batch)
                value = value / self._count(row, counts)
                total = total + row.match.weight * value
                metrics[ROW + row.key] = value.detach()
        if self._logit_rows:
            loss, values = self._tiled_rows(features["logits"], logits, weights.values, batch, counts)
            total = total + loss
            names = [ROW + row.key for row in self._logit_rows]
            names += [TEACHABLE + row.key for row in self._logit_rows if row.selects]
            metrics.update(zip(names, values.unbind(), strict=True))
        if weights.penalty is not None:
            total = total + weights.penalty
            metrics["penalty"] = weights.penalty.detach()
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
        logits = [as_logits(teacher["logits"]) if "logits" in teacher else NoLogits() for teacher in teachers]
        vocabulary = self.student.vocabulary
        # Columns before the softmax: a compressed student is compared with the teacher's distribution over its own ids.
        if vocabulary is not None and self.token_level:
            logits = [x.select(vocabulary.kept) for x in logits]
        return [x.in_dtype(self.dtype) for x in logits]

    def _count(self, row: Row, counts: Counts) -> int:
        # A step without any position of a kind has value 0 there: the denominator only must not be 0.
        return max(counts[row.counted(self.token_level)], 1)

    def _whole_row(
        self, row: Row, position: int, student: Features, teachers: Sequence[Features], weights: Tensor, batch: Batch
    ) -> Tensor:
        """Sum over valid positions of a row whose features exist whole, [].

        Args:
            weights: [T,B,L].
        """
        of_sequences = row.counted(self.token_level) == "sequences"
        if of_sequences:
            weights = self.weigher.of_sequences(weights, batch)  # [T,B,1]
        if row.match.feature == "nsp_logits":
            return next_sentence_row(row, student, teachers, weights, batch)
        mask = batch.real if of_sequences else batch.token_mask  # [B] or [B,L]
        return inner_row(row, position, student, teachers, weights, mask, self.projections)

    def _tiled_rows(
        self, student: Tensor | Logits, logits: Sequence[Logits], weights: Tensor, batch: Batch, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """All logits rows in one pass: tiled over a vocabulary, whole over classes. (loss [], row values [R])."""
        positions = positions_of(self._logit_rows, batch, self.token_level)
        spread = weights.expand(-1, -1, batch.targets.shape[1]) if self.token_level else weights  # [T,B,L], [T,B,1]
        at_positions = spread.flatten(1)[:, positions.index]  # [T,n]
        head = as_logits(student)
        in_tiles = isinstance(head, HeadLogits)
        first, *more = passes_for(
            self._logit_rows,
            [self._count(row, counts) for row in self._logit_rows],
            logits,
            positions,
            at_positions,
            token_level=self.token_level,
            size=self.tile,
            pieces=self.pieces if in_tiles else None,
        )
        # Class logits exist whole, with a handful of columns: there is nothing to cut.
        if not isinstance(head, HeadLogits):
            return first(head.rows(positions.index), at_positions, slice(0, len(positions.index)))
        tile, dtype, pieces = self.tile, self.dtype, self.pieces
        return tiled(head, positions.index, at_positions, first, tile=tile, dtype=dtype, more=more, pieces=pieces)
