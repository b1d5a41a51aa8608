"""The values of rows that need no tiles: hidden states, attention, and next-sentence logits.

Their features exist whole, because the forward passes of student and teachers left them; only logits of a vocabulary
are too large for that.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.models.features import Features, as_logits
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses
from mtkd.objective.projection import projection_key


def inner_row(
    row: Row,
    position: int,
    student: Features,
    teachers: Sequence[Features],
    weights: Tensor,
    mask: Tensor,
    projections: nn.ModuleDict,
) -> Tensor:
    """Sum over valid positions, layer pairs and weighted teachers of a row on hidden states or attention, [].

    Args:
        position: number of the row, which names its projections.
        weights: [T,B,L], or [T,B,1] where the row has one value per sequence.
        mask: positions that count, [B,L] or [B].
    """
    total = torch.zeros((), device=mask.device)
    for k, teacher in enumerate(teachers):
        for pair, (student_layer, teacher_layer) in enumerate(row.pairs[k]):
            source, target = student[row.feature_key(student_layer)], teacher[row.feature_key(teacher_layer)]
            assert isinstance(source, Tensor)
            assert isinstance(target, Tensor)
            key = projection_key(row, position, k, pair)
            if key in projections:
                # The adapter's weight is float32; autocast may have left the features in bfloat16.
                source = projections[key](source.float())
            values = row.spec(source, target, mask, row.match.options)  # [B,L] or [B]
            if row.match.weighted:
                values = values * (weights[k] if values.dim() == 2 else weights[k][:, 0])
            share = len(row.pairs[k]) if row.match.layer_reduction == "mean" else 1
            total = total + values.sum() / share
    return total


def next_sentence_row(
    row: Row, student: Features, teachers: Sequence[Features], weights: Tensor, batch: Batch
) -> Tensor:
    """Sum over sequences of a row on next-sentence logits, [].

    Args:
        weights: of sequences, [T,B,1].
    """
    index = batch.where(lambda rows: rows.real)  # [n]
    student_logits = as_logits(student["nsp_logits"]).rows(index)  # [n,2]
    if row.from_labels:
        assert batch.nsp_targets is not None, "the task says that there are next-sentence labels"
        value: Tensor = row.spec(student_logits, batch.nsp_targets[index], None, row.match.options).sum()
        return value
    teacher_logits = [as_logits(teacher["nsp_logits"]).rows(index) for teacher in teachers]  # T of [n,2]
    return ensemble_losses(row, student_logits, teacher_logits, weights[:, index, 0], None).sum()
