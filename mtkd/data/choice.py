"""Which rows of a source a run sees: the hold-out of a validation split, and the limits; both by the seed.

Of data with classes every class keeps its share of the rows, and at least one row where there is room for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from mtkd.config import DataConfig
    from mtkd.data.raw import Raw

SPLITS = ("train", "validation", "test")

Codes = Callable[["Raw", str], np.ndarray | None]
"""(rows, split) -> class number of every row, -1 without one; None for data without classes."""


def two_validations(where: str) -> UserError:
    """A validation split of the source's own, and one to hold out."""
    return UserError(
        "the source has a validation split of its own", where=f"{where}.validation_share", todo="drop validation_share"
    )


def hold_out(raw: Raw, config: DataConfig, codes: Codes) -> Raw:
    """The rows with a validation split taken from the train split, if the configuration asks for one.

    Raises:
        UserError, DataError: there is a validation split, no train split, or a single row.
    """
    if not config.validation_share:
        return raw
    if "validation" in raw.splits:
        raise two_validations("@data")
    if "train" not in raw.splits:
        raise UserError("there is no train split to hold out from", where="@data.validation_share")
    total = len(raw.splits["train"])
    size = min(max(1, round(total * config.validation_share)), total - 1)
    if size < 1:
        raise DataError("too few rows to hold any out", where=raw.origin("train").name, found=f"{total} rows")
    order = random_of(config.seed, "validation").permutation(total)
    classes = codes(raw, "train")
    taken = order[:size] if classes is None else by_class(classes, order, size, leave=True)
    chosen = {"train": np.setdiff1d(order, taken), "validation": np.sort(taken)}
    splits = {**raw.splits, **{s: raw.splits["train"].select(rows) for s, rows in chosen.items()}}
    origins = {**raw.origins, **{s: raw.origin("train").select(rows) for s, rows in chosen.items()}}
    return replace(raw, splits={s: splits[s] for s in SPLITS if s in splits}, origins=origins)


def limit(raw: Raw, config: DataConfig, codes: Codes) -> Raw:
    """At most as many rows per split as the configuration says, after those that it skips.

    Raises:
        UserError: a limit of a split that does not exist, or nothing is left of one.
    """
    splits, origins = dict(raw.splits), dict(raw.origins)
    for name, numbers in (("limit", config.limit), ("skip", config.skip)):
        for split in numbers:
            if split not in splits:
                raise UserError("no such split", where=f"@data.{name}.{split}", found=split, allowed=list(splits))
    for split in dict.fromkeys((*config.limit, *config.skip)):
        total, skipped = len(splits[split]), config.skip.get(split, 0)
        if skipped >= total:
            raise UserError(
                "no row is left", where=f"@data.skip.{split}", found=skipped, allowed=f"less than the {total:,} rows"
            )
        most = min(config.limit.get(split, total), total - skipped)
        if most < total:
            order = random_of(config.seed, f"limit {split}").permutation(total)
            classes = codes(raw, split)
            left = order[~np.isin(order, _first(classes, order, skipped))] if skipped else order
            rows = np.sort(_first(classes, left, most))
            origins[split] = raw.origin(split).select(rows)
            splits[split] = splits[split].select(rows)
    return replace(raw, splits=splits, origins=origins)


def _first(classes: np.ndarray | None, order: np.ndarray, num_rows: int) -> np.ndarray:
    """The first rows of an order, or of each class its share of them; [num_rows]."""
    if classes is None:
        return order[:num_rows]
    return order[by_class(classes[order], np.arange(len(order)), num_rows)]


def by_class(classes: np.ndarray, order: np.ndarray, num_rows: int, *, leave: bool = False) -> np.ndarray:
    """`num_rows` rows in which every class has its share: one row at least where there is room, then in proportion.

    Rows without a class (-1) are a group of their own that needs no row.

    Args:
        classes: of every row, [rows]. order: a permutation of the rows; the first of each class are taken.
        leave: leave a row of every class behind, where there is room.

    Returns:
        Row numbers, [num_rows].
    """
    names, sizes = np.unique(classes, return_counts=True)
    real = (names >= 0).astype(np.int64)
    most = np.maximum(sizes - real, 0) if leave else sizes
    if most.sum() < num_rows:  # no room to leave one of each behind
        most = sizes
    counts = _shares(sizes, np.minimum(real, most), most, num_rows)
    taken = [order[classes[order] == name][:count] for name, count in zip(names, counts, strict=True)]
    return np.concatenate(taken)


def _shares(sizes: np.ndarray, least: np.ndarray, most: np.ndarray, total: int) -> np.ndarray:
    """How many of each group: in proportion to the sizes, within bounds, `total` in all; [groups].

    Where there is no room for one of each, the largest groups have it.
    """
    if least.sum() > total:
        chosen = np.zeros_like(sizes)
        chosen[np.argsort(-sizes * least, kind="stable")[:total]] = 1
        return chosen
    exact = total * sizes / sizes.sum()
    counts = np.clip(np.floor(exact).astype(np.int64), least, most)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        open_groups = counts < most if step > 0 else counts > least
        lacking = np.where(open_groups, step * (exact - counts), -np.inf)
        counts[np.argmax(lacking)] += step
    return counts


def random_of(seed: int, purpose: str) -> np.random.Generator:
    """Independent random numbers for every purpose of one seed."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
