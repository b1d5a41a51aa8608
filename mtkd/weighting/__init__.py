"""Weightings: how much each teacher counts, per example or per token. ``traits -> weights [T,B,L]`` (L may be 1)."""

from mtkd.weighting import labels, simple, unlabelled
from mtkd.weighting.base import Weighting
from mtkd.weighting.traits import TRAITS, Traits, trait

__all__ = ["TRAITS", "Traits", "Weighting", "labels", "simple", "trait", "unlabelled"]
