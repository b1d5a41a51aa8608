"""Data of a specialist, made of a file with all labels: its own classes stay, and every other label is one class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.choice import random_of
from mtkd.data.labelkinds import name_of
from mtkd.data.labels import label_values
from mtkd.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig
    from mtkd.data.raw import Raw

_SHOWN = 12
"""Labels that a message lists."""


def relabelled(config: DataConfig, raw: Raw) -> Raw:
    """The rows with the labels that `specialist` of the data entry makes of theirs; as they are without it.

    Rows without a label have none afterwards. Of the train split's rows of other classes `share` is kept, by the seed.

    Raises:
        DataError: no row of the train split has one of the specialist's classes, or none has another one.
    """
    wanted = config.specialist
    if wanted is None:
        return raw
    splits, origins = dict(raw.splits), dict(raw.origins)
    for split, rows in raw.splits.items():
        origin = raw.origin(split)
        names = [None if v is None else name_of(v) for v in label_values(rows, config.label, origin)]
        if config.labels and (bad := next((i for i, n in enumerate(names) if n and n not in config.labels), -1)) >= 0:
            raise DataError("unknown label", where=origin.where(bad), found=names[bad], allowed=config.labels)
        own = np.array([name in wanted.classes for name in names], bool)
        others = np.array([name is not None for name in names], bool) & ~own
        if split == "train":
            _check_found(config, names, origin.name)
        merged = [wanted.other if is_other else name for name, is_other in zip(names, others, strict=True)]
        splits[split] = _with_labels(rows, config.label, merged)
        origins[split] = origin
        if split == "train" and wanted.share < 1:
            order = random_of(config.seed, "other classes").permutation(np.flatnonzero(others))
            kept = order[: max(1, round(len(order) * wanted.share))]
            chosen = np.sort(np.concatenate([np.flatnonzero(~others), kept]))
            splits[split], origins[split] = splits[split].select(chosen), origin.select(chosen)
    return replace(raw, splits=splits, origins=origins)


def _with_labels(rows: Dataset, column: str, labels: list[str | None]) -> Dataset:
    """The rows with another column of labels; the types of a declared one would not hold the new names."""
    from datasets import Value as Kind

    rest = rows.remove_columns(column) if column in rows.column_names else rows
    return rest.add_column(column, labels, feature=Kind("string"))


def _check_found(config: DataConfig, names: list[str | None], where: str) -> None:
    """Refuse classes that no row has: a name that is spelled in another way would silently be an other class."""
    assert config.specialist is not None
    known = sorted({name for name in names if name is not None})
    wanted = config.specialist.classes
    if missing := [name for name in wanted if name not in known]:
        raise DataError(
            "no row of the train split has this class of the specialist",
            where=where,
            found=missing[0],
            allowed=", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""),
            todo=nearest(missing[0], known),
        )
    if not set(known) - set(wanted):
        raise DataError(
            "no row of the train split is of another class than the specialist's",
            where=where,
            found=f"{len(known)} classes, all in specialist.classes",
            todo="drop specialist, or use a file with the other classes too",
        )
