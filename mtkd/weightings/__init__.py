"""Weightings: how much each teacher counts, per example or per token. ``traits -> weights [T,B,L]`` (L may be 1)."""

from mtkd.weightings import labels, simple, unlabelled
from mtkd.weightings.base import Weighting
from mtkd.weightings.traits import TRAITS, Traits, trait

__all__ = ["TRAITS", "Traits", "Weighting", "labels", "simple", "trait", "unlabelled"]
