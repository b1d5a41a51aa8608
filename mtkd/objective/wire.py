"""How the objective of a stage is put together: by the build with weights, by the plan without values, by tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from mtkd.models.info import ModelInfo
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import Row
from mtkd.objective.objective import Objective
from mtkd.objective.projection import make_projections
from mtkd.weightings.base import Weighting


@dataclass(frozen=True)
class Wiring:
    """What a stage's objective depends on besides its models, rows and weighting.

    Attributes:
        per: "example" or "token" weights. token_level: targets are [B,L], logits are vocabulary-size.
        tile: positions per tile. dtype: of the matrix products. seed: of the projections.
    """

    per: str
    token_level: bool
    tile: int
    dtype: torch.dtype = torch.float32
    seed: int = 0


def wire(
    student: TappedModel,
    teachers: Mapping[str, ModelInfo],
    rows: Sequence[Row],
    weighting: Weighting,
    how: Wiring,
    pieces: Pieces = EVERY_PIECE,
) -> Objective:
    """The objective of a student that learns from teachers, which are known by name and shape, in pool order."""
    return Objective(
        student,
        rows,
        weighting,
        make_projections(rows, student.info, list(teachers.values()), how.seed),
        list(teachers),
        per=how.per,
        token_level=how.token_level,
        tile=how.tile,
        dtype=how.dtype,
        pieces=pieces,
    )
