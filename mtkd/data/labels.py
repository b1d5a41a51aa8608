"""Labels of classification data: which classes there are, and the class number (or the number) of every row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.config import RANDOM_TOKENS
from mtkd.data.files import require_column
from mtkd.errors import DataError, UserError, nearest
from mtkd.features import NO_LABEL

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig
    from mtkd.data.files import Origin
    from mtkd.data.sources import Raw

_TEXT_KINDS = ("string", "large_string")


def find_labels(config: DataConfig, raw: Raw) -> tuple[tuple[str, ...], int]:
    """Class names in order, and the number of outputs of the classifier.

    The names are `labels` if given, else those that the source declares, else the sorted values of the train split
    (by number when all are whole numbers). A column of numbers that are not all written as whole ones, without
    `labels`, is a regression: no names, one output.

    Raises:
        UserError: no labels and no train split to find them in.
        DataError: a missing column or label, or a single class; names the file and row.
    """
    if config.labels:
        if len(set(config.labels)) < max(2, len(config.labels)):
            raise UserError("needs two or more different names", where="data.labels", found=list(config.labels))
        return config.labels, len(config.labels)
    split = "train" if "train" in raw.splits else next(iter(raw.splits))
    rows, origin = raw.splits[split], raw.origin(split)
    require_column(rows, config.label, origin, "label")
    declared = getattr(rows.features[config.label], "names", None)
    if declared:
        return tuple(declared), len(declared)
    if split != "train":
        raise UserError("without a train split the classes must be named", where="data.labels", todo="set `labels`")
    values = [_present(value, origin, i, config.label) for i, value in enumerate(rows[config.label][:])]
    if _is_regression(values):
        return (), 1
    names = {class_name(value) for value in values}
    ordered = sorted(names, key=int) if all(_is_whole(name) for name in names) else sorted(names)
    if len(ordered) < 2:
        raise DataError("all rows have the same label", where=origin.name, found=ordered[0], allowed="two classes")
    return tuple(ordered), len(ordered)


def read_labels(config: DataConfig, rows: Dataset, origin: Origin, names: tuple[str, ...]) -> np.ndarray:
    """The label of every row: class numbers int64, or float32 when there are no names (regression).

    Made-up texts have none: NO_LABEL.

    Raises:
        DataError: naming the file and row of a missing, unknown or non-numeric label.
    """
    if config.source == RANDOM_TOKENS:
        return np.full(len(rows), NO_LABEL, np.int64)
    require_column(rows, config.label, origin, "label")
    declared = getattr(rows.features[config.label], "names", None)
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.empty(len(rows), np.int64 if names else np.float32)
    for index, value in enumerate(rows[config.label][:]):
        value = _present(value, origin, index, config.label)
        if declared and isinstance(value, int):
            if not 0 <= value < len(declared):  # the hub marks an unlabeled row with -1
                raise DataError("no label", where=origin.where(index), found=value, allowed=declared)
            value = declared[value]
        if not names:
            labels[index] = _number(value, origin, index)
            continue
        name = class_name(value)
        if name not in numbers:
            todo = nearest(name, names)
            raise DataError("unknown label", where=origin.where(index), found=name, allowed=names, todo=todo)
        labels[index] = numbers[name]
    return labels


def class_name(value: Any) -> str:
    """A class as text: 1 and 1.0 are the class "1", True is "true"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value)


def _present(value: Any, origin: Origin, index: int, column: str) -> Any:
    missing = value is None or (isinstance(value, str) and not value.strip())
    if missing or (isinstance(value, float) and math.isnan(value)):
        raise DataError(
            f"no label in column '{column}'",
            where=origin.where(index),
            found="nothing" if value is None else repr(value),
            todo="drop the row or give it a label",
        )
    if not isinstance(value, str | int | float):
        raise DataError("a label must be text or a number", where=origin.where(index), found=value)
    return value


def _is_regression(values: list[Any]) -> bool:
    if all(isinstance(value, float) for value in values):
        return True
    if not all(isinstance(value, str) for value in values):
        return False
    return all(_is_number(v) for v in values) and not all(_is_whole(v) for v in values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def _number(value: Any, origin: Origin, index: int) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError("a regression needs a number", where=origin.where(index), found=value)
    return number
