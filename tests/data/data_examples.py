"""Texts for the data tests."""

from __future__ import annotations

import numpy as np

WORDS = (
    *("the", "teacher", "and", "a", "student", "share", "one", "vocabulary", "while", "loss,", "weight", "&"),
    *("feature", "mean", "naïve", "things", "–", "漢字", "too"),
)


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words drawn from a few words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]
