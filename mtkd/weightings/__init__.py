"""Weightings: how much each teacher counts, per example or per token. ``traits -> weights [T,B,L]`` (L may be 1)."""

from mtkd.weightings import (
    abstaining,
    certainty,
    constant,
    correctness,
    dropout,
    extrapolation,
    facts,
    gradients,
    learned,
    posterior,
    reinforced,
    routing,
    uncertainty,
)
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.traits import FACTS, TRAITS, Around, Traits, fact, trait

__all__ = [
    "FACTS",
    "TRAITS",
    "Around",
    "StageFacts",
    "Traits",
    "Weighting",
    "abstaining",
    "certainty",
    "constant",
    "correctness",
    "dropout",
    "extrapolation",
    "fact",
    "facts",
    "gradients",
    "learned",
    "posterior",
    "reinforced",
    "routing",
    "trait",
    "uncertainty",
]
