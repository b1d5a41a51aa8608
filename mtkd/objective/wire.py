"""Wire the objective of a stage, for the build with weights, the plan without values, and tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtkd.models.info import ModelInfo
from mtkd.models.pieces import EVERY_PIECE, Pieces
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import Row
from mtkd.objective.objective import Objective
from mtkd.objective.projection import make_projections
from mtkd.objective.settings import Wiring
from mtkd.weightings.base import Weighting

__all__ = ["Wiring", "wire"]


def wire(
    student: TappedModel,
    teachers: Mapping[str, ModelInfo],
    rows: Sequence[Row],
    weighting: Weighting,
    how: Wiring,
    pieces: Pieces = EVERY_PIECE,
) -> Objective:
    """The objective of a student and its teachers, given by name and shape in pool order."""
    projections = make_projections(rows, student.info, list(teachers.values()), how.seed)
    return Objective(student, rows, weighting, projections, list(teachers), how, pieces)
