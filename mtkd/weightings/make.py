"""From the weighting that a stage names to the module, and what the plan asks of it before."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from mtkd.config import Named, StageConfig
from mtkd.config.match import Match
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES
from mtkd.models.taps import TappedModel
from mtkd.registry import check_options
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.faults import check_faults
from mtkd.weightings.gradients import has_gradient
from mtkd.weightings.spec import GIVEN, WEIGHTINGS, Reads, WeightingSpec
from mtkd.weightings.traits import FACTS, TRAITS, undeclared
from mtkd.weightings.trial import Trial, try_weighting


def stage_facts(teachers: tuple[str, ...], sizes: Sequence[int], student: TappedModel, seed: int) -> StageFacts:
    """The `StageFacts` of a student and its teachers.

    Args:
        sizes: the teachers' numbers of parameters.
    """
    return StageFacts(teachers, tuple(sizes), student.info.width, student.info.num_labels, seed)


def make_weighting(named: Named, facts: StageFacts, where: str) -> Weighting:
    """A weighting from its name and options.

    Raises:
        UserError: unknown name or option, or a value its constructor refuses.
    """
    spec = WEIGHTINGS.find(named.name, f"{where}.name")
    check_options(named.options, spec.options(), where)
    filled = {"teachers": facts.teachers, "facts": facts}
    parameters = inspect.signature(spec.cls).parameters
    options = {**named.options, **{name: filled[name] for name in GIVEN if name in parameters}}
    try:
        weighting: Weighting = spec.construct(options)
    except UserError as error:  # its place is within the block of the weighting
        error.where = where + error.where.removeprefix("@").removeprefix("weighting")
        raise
    except ValueError as error:
        raise UserError(str(error), where=f"{where}.options") from error
    if unknown := weighting.may_read() - FACTS.keys() - TRAITS.keys():
        raise UserError(
            f"weighting '{named.name}' reads what nothing provides",
            where=where,
            found=sorted(unknown),
            allowed=sorted([*FACTS, *TRAITS]),
        )
    return weighting


def stage_reads(stage: StageConfig, where: str, *, token_level: bool) -> Reads:
    """Say what the weighting of a stage reads: as it declares, else as one trial shows.

    Args:
        where: the stage in the configuration.
    """
    spec = WEIGHTINGS.find(stage.weighting.name, f"{where}.weighting.name")
    declared = spec.reads(stage.weighting.options, len(stage.teachers))
    return declared or _tried(_Asked.of(spec, stage, f"{where}.weighting", token_level))[0]


@dataclass(frozen=True)
class _Asked:
    """All that a trial depends on; equal ones share one result."""

    spec: WeightingSpec
    options: str
    teachers: tuple[str, ...]
    distils: bool
    per: str
    token_level: bool
    named: Named = field(compare=False)
    where: str = field(compare=False)

    @classmethod
    def of(cls, spec: WeightingSpec, stage: StageConfig, where: str, token_level: bool) -> _Asked:
        options = json.dumps(stage.weighting.options, sort_keys=True, default=repr)
        teachers = tuple(teacher.name for teacher in stage.teachers)
        return cls(spec, options, teachers, stage.kind == "distill", stage.per, token_level, stage.weighting, where)


# Kept, so that the checks, the plan and a run in the same process share one construction and one trial.
@lru_cache(maxsize=256)
def _tried(asked: _Asked) -> tuple[Reads, Trial | None]:
    """(what a weighting reads, its trial; None in a stage that learns from no teachers).

    Raises:
        UserError: an option, or a value of one, that it refuses.
    """
    with torch.random.fork_rng(devices=[]):
        weighting = make_weighting(asked.named, StageFacts.stand_in(asked.teachers), asked.where)
    trial = None
    if asked.distils and asked.teachers:
        trial = try_weighting(weighting, len(asked.teachers), per=asked.per, token_level=asked.token_level)
    reads = asked.spec.reads(asked.named.options, len(asked.teachers))
    if reads is None:
        prepared = {name for name, fact in FACTS.items() if fact.asked}
        names = (trial.names - prepared if trial else frozenset()) | (weighting.may_read() & prepared)
        reads = Reads(names, asked.spec.needs_labels, weighting.per_token, declared=False)
    return replace(reads, per_token=asked.spec.per_token(asked.named.options, weighting)), trial


def _check_signs(stage: StageConfig, spec: WeightingSpec, rows: Sequence[Match], where: str) -> None:
    """Refuse rows and teachers that negative weights, or a weighting of few losses, mean nothing for.

    Raises:
        UserError: naming the row, or the teacher.
    """
    only: frozenset[str] = spec.cls.only_losses  # type: ignore[attr-defined]
    for i, row in enumerate(rows if only else ()):
        if row.weighted and row.target != "labels" and row.loss not in only:
            raise UserError(
                f"weighting '{spec.name}' has no meaning for this loss",
                where=f"{where}.match",
                found=f"row {i + 1}: {row.feature}:{row.loss}",
                allowed=sorted(only & LOSSES.keys()),
                todo="its weights hold for losses that are linear in the teachers' log-probabilities",
            )
    if spec.negative and any(row.weighted and row.ensemble != "losses" for row in rows):
        raise UserError(
            f"weights of '{spec.name}' may be negative, and a mixture of teachers is made with shares",
            where=f"{where}.match",
            found="ensemble: probabilities or logits",
            allowed="ensemble: losses",
        )
    if spec.negative and any(teacher.domains for teacher in stage.teachers):
        raise UserError(
            f"weights of '{spec.name}' may be negative, and a domain's teachers share what all have",
            where=f"{where}.teachers",
            todo="drop the teachers' `domain`: give each domain a stage, or each teacher its base",
        )


def check_weighting(stage: StageConfig, rows: Sequence[Match], where: str, *, token_level: bool) -> None:
    """Refuse a weighting that its stage gives nothing to work with, or that gives its stage impossible weights.

    This is the one construction of a plan: options must be valid before any model is read.
    """
    name = stage.weighting.name
    spec = WEIGHTINGS.find(name, f"{where}.weighting.name")
    reads, trial = _tried(_Asked.of(spec, stage, f"{where}.weighting", token_level))
    if stage.per == "token" and not reads.per_token:
        raise UserError(
            f"weighting '{name}' with these options has one weight per example, none per token",
            where=f"{where}.per",
            found=stage.per,
            allowed="example",
        )
    if "gram" in reads.names and not any(map(has_gradient, rows)):
        raise UserError(
            f"weighting '{name}' compares the teachers' gradients with respect to the student's logits",
            where=f"{where}.match",
            found="no weighted row that compares logits with the teachers",
            todo="add one, e.g. {feature: logits, loss: kl}",
        )
    _check_signs(stage, spec, rows, where)
    if trial is None:
        return
    check_faults(trial.faults, name, f"{where}.weighting", negative=spec.negative)
    if more := sorted(trial.names - reads.names):
        error = undeclared(more[0], reads.names, f"{where}.weighting")
        if not reads.declared:  # a decorator's `reads` of these alone would refuse the traits
            prepared = {*more, *(name for name in reads.names & FACTS.keys() if FACTS[name].asked)}
            names = ", ".join(map(repr, sorted(prepared)))
            error.todo = f"name in the class all that the stage prepares: reads = frozenset({{{names}}})"
        raise error
