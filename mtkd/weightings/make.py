"""From the weighting that a stage names to the module, and what its stage must give it."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from mtkd.config import Named, StageConfig
from mtkd.config.match import Match
from mtkd.errors import UserError
from mtkd.models.taps import TappedModel
from mtkd.registry import check_options
from mtkd.weightings.base import READABLE, StageFacts, Weighting
from mtkd.weightings.faults import try_weighting
from mtkd.weightings.gradients import has_gradient
from mtkd.weightings.spec import GIVEN, WEIGHTINGS


def stage_facts(teachers: tuple[str, ...], sizes: Sequence[int], student: TappedModel, seed: int) -> StageFacts:
    """What a weighting may know of its stage. Args: sizes: the teachers' numbers of parameters."""
    return StageFacts(teachers, tuple(sizes), student.info.width, student.info.num_labels, seed)


def make_weighting(named: Named, facts: StageFacts, where: str) -> Weighting:
    """A weighting from its name and options.

    Raises:
        UserError: unknown name or option, or a value its constructor refuses.
    """
    spec = WEIGHTINGS.find(named.name, f"{where}.name")
    check_options(named.options, spec.options(), where)
    given = {"teachers": facts.teachers, "facts": facts}
    parameters = inspect.signature(spec.cls).parameters
    options = {**named.options, **{name: given[name] for name in GIVEN if name in parameters}}
    try:
        weighting: Weighting = spec.cls(**options)
    except UserError as error:  # its place is within the block of the weighting
        error.where = where + error.where.removeprefix("@").removeprefix("weighting")
        raise
    except ValueError as error:
        raise UserError(str(error), where=f"{where}.options") from error
    weighting.negative = spec.negative
    if not weighting.reads <= READABLE:
        raise UserError(
            f"weighting '{named.name}' reads what nothing provides",
            where=where,
            found=sorted(weighting.reads - READABLE),
            allowed=sorted(READABLE),
        )
    return weighting


def check_weighting(
    weighting: Weighting, stage: StageConfig, rows: Sequence[Match], where: str, *, token_level: bool
) -> None:
    """Refuse a weighting that its stage gives nothing to work with, or that gives its stage impossible weights."""
    name = stage.weighting.name
    if stage.per == "token" and not weighting.per_token:
        raise UserError(
            f"weighting '{name}' with these options has one weight per example, none per token",
            where=f"{where}.per",
            found=stage.per,
            allowed="example",
        )
    if "gram" in weighting.reads and not any(map(has_gradient, rows)):
        raise UserError(
            f"weighting '{name}' compares the teachers' gradients with respect to the student's logits",
            where=f"{where}.match",
            found="no weighted row that compares logits with the teachers",
            todo="add one, e.g. {feature: logits, loss: kl}",
        )
    if weighting.negative and any(row.weighted and row.ensemble != "losses" for row in rows):
        raise UserError(
            f"weights of '{name}' may be negative, and a mixture of teachers is made with shares",
            where=f"{where}.match",
            found="ensemble: probabilities or logits",
            allowed="ensemble: losses",
        )
    if stage.kind == "distill" and stage.teachers:
        try_weighting(
            weighting,
            name,
            len(stage.teachers),
            per=stage.per,
            token_level=token_level,
            where=f"{where}.weighting",
        )
