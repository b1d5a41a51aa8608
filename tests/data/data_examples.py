"""Texts and sources for the data tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtkd.config import DataConfig
from mtkd.data.raw import Raw
from mtkd.data.sources import check_source, choose_rows, read_source

WORDS = (
    *("the", "teacher", "and", "a", "student", "share", "one", "vocabulary", "while", "loss,", "weight", "&"),
    *("feature", "mean", "naïve", "things", "–", "漢字", "too"),
)


def sentences(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words drawn from a few words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest + 1))) for _ in range(count)]


def load_raw(config: DataConfig, base: Path) -> Raw:
    """The rows of a source as a run chooses them: checked, validation held out, limits applied."""
    check_source(config, base)
    return choose_rows(read_source(config, base), config)
