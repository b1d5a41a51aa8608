"""Random numbers that are pure functions of their use: the same for every cut of a batch, and after a resume.

A generator's draws would depend on how many came before, on the rank and on the order of teachers. numpy's Philox with
spawn keys could replace these 20 lines, but finished and running stages drew from them: other draws, other students.
"""

from __future__ import annotations

import hashlib

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_TO_UNIT = 2.0**-53


def uniform(*parts: int | str | np.ndarray) -> np.ndarray:
    """Numbers in [0,1) that depend on every part and look independent of each other; float64.

    Args:
        parts: seeds, step numbers, names, and arrays of numbers, which broadcast.

    Source: Steele et al. 2014, Fast Splittable Pseudorandom Number Generators (SplitMix64), its mixing function.
    """
    state = np.zeros(1, np.uint64)
    for part in parts:
        state = _mixed(state ^ _number(part))
    return (state >> np.uint64(11)) * _TO_UNIT


def uniform_of(names: tuple[str, ...], *parts: int | np.ndarray) -> np.ndarray:
    """`uniform` for every name, [T, ...]: keyed by the name, so that the order of names does not matter."""
    return np.stack([uniform(name, *parts) for name in names])


def _mixed(state: np.ndarray) -> np.ndarray:
    state = state + _GOLDEN  # arrays of unsigned integers wrap around, which is meant
    state = (state ^ (state >> np.uint64(30))) * _FIRST
    state = (state ^ (state >> np.uint64(27))) * _SECOND
    return state ^ (state >> np.uint64(31))


def _number(part: int | str | np.ndarray) -> np.ndarray:
    if isinstance(part, str):
        part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "big")
    if isinstance(part, int):
        return np.array([part % 2**64], np.uint64)
    return part.astype(np.int64).view(np.uint64)
