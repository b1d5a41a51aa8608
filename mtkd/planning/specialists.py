"""Check a stage whose teachers know a part of its classes, and the weighting that reads their output "other"."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mtkd.errors import UserError
from mtkd.objective.compile import Row
from mtkd.planning.spec import StageSpec
from mtkd.weightings.make import stage_reads

_SHOWN = 8
"""Classes that a message lists."""


def check_specialists(spec: StageSpec, rows: Sequence[Row]) -> None:
    """Refuse a weighting by the output "other" where no teacher has one, and rows to which probability 0 is infinite.

    Args:
        rows: compiled against all teachers.
    Raises:
        UserError: naming weighting or row.
    """
    if not spec.teachers:
        return
    reads = stage_reads(spec.stage, spec.where, token_level=spec.token_level)
    if "own_mass" in reads.names and not any(teacher.num_others for teacher in spec.teachers):
        raise _nothing_to_read(spec, "no teacher with `other`")
    for row in rows:
        if row.is_logits and not row.from_labels:
            _check_row(row, spec)


def unknown_classes(spec: StageSpec) -> tuple[str, ...]:
    """A note of the classes that no teacher of the stage knows; none where each has a teacher."""
    if not spec.teachers or spec.stage.kind != "distill" or not (missing := _missing_everywhere(spec)):
        return ()
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return (f"no teacher has an output for {', '.join(missing[:_SHOWN])}{more}: soft targets never name them",)


def _nothing_to_read(spec: StageSpec, found: str) -> UserError:
    return UserError(
        f"weighting '{spec.stage.weighting.name}' reads the probability of the teachers' outputs that mean `none of my "
        "classes`",
        where=f"{spec.where}.weighting",
        found=found,
        allowed="classifiers that have one",
        todo="train specialists with such a class, and name it: teachers: [{model: ..., other: OUTPUT}]; "
        "a cache keeps it if it was made of such a teacher; or choose another weighting",
    )


def _missing_everywhere(spec: StageSpec) -> list[str]:
    """Classes that no teacher has an output for, in the data's order."""
    first, *others = spec.teachers
    return [name for name in first.missing if all(name in teacher.missing for teacher in others)]


def _check_row(row: Row, spec: StageSpec) -> None:
    """Refuse a row that compares logits or a divergence in which a class without an output is infinitely far away."""
    lacking = [teacher for teacher in spec.teachers if teacher.missing]
    if not lacking:
        return
    if row.match.options.get("standardise"):
        raise UserError(
            f"row '{row.key}': mean and deviation of logits mean nothing where a class has none",
            where=row.place,
            found=f"standardise: true, and teacher '{lacking[0].name}' has no output for '{lacking[0].missing[0]}'",
            todo="drop standardise",
        )
    ensemble = row.match.ensemble if len(spec.teachers) > 1 else "losses"
    if ensemble == "probabilities" and not _missing_everywhere(spec):
        return  # the mixture has every class
    if ensemble == "probabilities" or (ensemble == "losses" and "hidden" not in row.spec.inputs):
        if _bounded(row):
            return
        why = f"loss '{row.match.loss}' is infinite where a teacher gives a class probability 0"
    else:
        why = "a class that a teacher has no output for has no logit to compare or to average"
    probable = "" if ensemble == "probabilities" or len(spec.teachers) < 2 else "ensemble: probabilities with "
    raise UserError(
        f"row '{row.key}': {why}",
        where=row.place,
        found=f"teacher '{lacking[0].name}' has no output for {len(lacking[0].missing)} classes, such as "
        f"'{lacking[0].missing[0]}'; ensemble: {row.match.ensemble}",
        allowed="kl, soft_ce, jsd, skew_kl, total_variation",
        todo=f"take {probable}one of these losses",
    )


def _bounded(row: Row) -> bool:
    """Whether a loss stays where it is while the teacher's logit of one class falls; tried with two logits."""
    student, mask = torch.zeros(1, 2), torch.ones(1, dtype=torch.bool)
    far, farther = (
        float(row.spec(student, torch.tensor([[0.0, low]]), mask, row.match.options)) for low in (-1e6, -1e7)
    )
    return math.isclose(far, farther, rel_tol=1e-3, abs_tol=1e-6)
