"""Width adapters: a trainable linear map from the student's width to a teacher's, where a row needs one.

They live in the objective, so they are optimised, clipped and checkpointed with the student, and never exported.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from mtkd.models.info import ModelInfo
from mtkd.objective.compile import PROJECTED, Row


def projection_key(row: Row, position: int, teacher: int, pair: int) -> str:
    """Name of the adapter of a layer pair; pairs share one unless the row says per_layer."""
    suffix = f"_pair{pair}" if row.match.projection == "per_layer" else ""
    return f"row{position}_teacher{teacher}{suffix}"


def make_projections(
    rows: Sequence[Row], student: ModelInfo, teachers: Sequence[ModelInfo], seed: int
) -> nn.ModuleDict:
    """One bias-free linear map H_S -> H_T per (row, teacher) [and layer pair] whose widths differ.

    MT-BERT's per-layer projections exist at equal width too (Wu et al. 2021, equation 4: W_ij per teacher and layer).

    Args:
        seed: of their initialisation.
    """
    projections = nn.ModuleDict()
    # The global random state stays: dropout must not depend on how many adapters a stage has.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for position, row in enumerate(rows):
            if row.match.feature not in PROJECTED or row.from_labels:
                continue
            for k, teacher in enumerate(teachers):
                if student.width == teacher.width and row.match.projection == "shared":
                    continue
                for pair in range(len(row.pairs[k])):
                    key = projection_key(row, position, k, pair)
                    # Layer pairs of a row share an adapter unless it says per_layer.
                    if key not in projections:
                        projections[key] = _adapter(student.width, teacher.width)
    return projections


def _adapter(source: int, target: int) -> nn.Linear:
    linear = nn.Linear(source, target, bias=False)
    if source == target:
        nn.init.eye_(linear.weight)  # at first it changes nothing
    return linear
