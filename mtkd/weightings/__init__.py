"""Weightings: how much each teacher counts, per example or per token. ``traits -> weights [T,B,L]`` (L may be 1)."""

from mtkd.weightings import (
    dropped,
    facts,
    gradients,
    labels,
    learned,
    reinforced,
    routed,
    simple,
    uncertainty,
    unlabelled,
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
    "dropped",
    "fact",
    "facts",
    "gradients",
    "labels",
    "learned",
    "reinforced",
    "routed",
    "simple",
    "trait",
    "uncertainty",
    "unlabelled",
]
