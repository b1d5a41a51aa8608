"""Labels of classification data: which classes there are, and the class number (or the number) of every row."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.config import RANDOM_TOKENS
from mtkd.data.batch import NO_LABEL
from mtkd.data.files import require_column, values_of
from mtkd.data.labelkinds import Kind, Value, in_order, kind_of, name_of, number_of
from mtkd.data.raw import FoundLabels
from mtkd.errors import DataError, UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig
    from mtkd.data.files import Origin
    from mtkd.data.raw import Raw

UNLABELLED = -1
"""How the hub marks a row without a label, where the source declares its classes."""

LARGEST = 1e18
"""A regression's largest number: its square, and the sum of a batch's, must stay below float32's 3.4e38."""


def find_labels(config: DataConfig, raw: Raw) -> FoundLabels:
    """The kind and the classes of a source, from all of its train split: before anything is held out or limited.

    The names are `labels` if given, else those that the source declares, else the values of the train split in order;
    `mtkd.data.labelkinds` has the rules of `label_kind: auto`.

    Raises:
        UserError: no labels and no train split to find them in.
        DataError: no split has the column, a label that is no number, or a single class.
    """
    if config.classes:
        if len(set(config.classes)) < max(2, len(config.classes)):
            raise UserError("needs two or more different names", where="@data.labels", found=list(config.classes))
        return FoundLabels("class", config.classes, "named in the configuration")
    if config.source == RANDOM_TOKENS:
        return FoundLabels("", (), "made-up texts have no labels")
    _require_somewhere(config, raw)
    if config.label_kind != "number":
        for rows in raw.splits.values():
            declared = _declared(rows, config.label)
            if declared:
                return FoundLabels("class", declared, "declared by the source")
    if "train" not in raw.splits:
        if config.label_kind == "number":
            return FoundLabels("number", (), "label_kind: number")
        raise UserError("without a train split the classes must be named", where="@data.labels", todo="set `labels`")
    rows, origin = raw.splits["train"], raw.origin("train")
    values = label_values(rows, config.label, origin)
    if all(value is None for value in values):
        kind = "number" if config.label_kind == "number" else ""
        return FoundLabels(kind, (), "no row of the train split has a label")
    return _from_values(config, values, origin)


def _from_values(config: DataConfig, values: list[Value | None], origin: Origin) -> FoundLabels:
    counts = Counter(value for value in values if value is not None)
    if config.label_kind == "auto":
        kind = kind_of(counts, lambda text: origin.where(values.index(text)))
    else:
        kind = Kind(config.label_kind, "set by label_kind")
    if kind.name == "number":
        return FoundLabels("number", (), kind.why, kind.by_values)
    ordered = in_order({name_of(value) for value in counts})
    if len(ordered) < 2:
        raise DataError("all rows have the same label", where=origin.name, found=ordered[0], allowed="two classes")
    return FoundLabels("class", tuple(ordered), kind.why, kind.by_values)


def label_values(rows: Dataset, column: str, origin: Origin) -> list[Value | None]:
    """The label of every row as the source has it, text without spaces around it; None where there is none.

    A declared class has its name. There is none where the column is missing, empty, NaN, or -1 where the source
    declares its classes.

    Raises:
        DataError: naming the file and row of what is neither text nor a number.
    """
    if column not in rows.column_names:
        return [None] * len(rows)
    declared = _declared(rows, column)
    values: list[Value | None] = [None] * len(rows)
    for index, value in enumerate(values_of(rows, column)):
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if not isinstance(value, str | int | float):
            raise DataError("a label must be text or a number", where=origin.where(index), found=value)
        if declared and isinstance(value, int):
            if value == UNLABELLED:
                continue
            if not 0 <= value < len(declared):
                raise DataError("unknown label", where=origin.where(index), found=value, allowed=declared)
            value = declared[value]
        if isinstance(value, str):
            value = value.strip()
        if value != "":
            values[index] = value
    return values


def read_labels(config: DataConfig, rows: Dataset, origin: Origin, names: tuple[str, ...]) -> np.ndarray:
    """The label of every row: class numbers int64, or float32 when there are no names (regression).

    A row without one, and every made-up text, has NO_LABEL; NaN in a regression.

    Raises:
        DataError: naming the file and row of an unknown or non-numeric label.
    """
    labels = np.full(len(rows), NO_LABEL, np.int64) if names else np.full(len(rows), np.nan, np.float32)
    if config.source == RANDOM_TOKENS:
        return labels
    numbers = {name: number for number, name in enumerate(names)}
    for index, value in enumerate(label_values(rows, config.label, origin)):
        if value is None:
            continue
        if not names:
            labels[index] = _number(value, origin, index)
            continue
        number = _class_of(value, numbers)
        if number is None:
            raise _unknown(config, name_of(value), names, origin.where(index))
        labels[index] = number
    return labels


def class_codes(config: DataConfig, rows: Dataset, origin: Origin, names: tuple[str, ...]) -> np.ndarray:
    """Class number of every row, -1 for none or an unknown one, [rows] int64."""
    numbers = {name: number for number, name in enumerate(names)}
    values = label_values(rows, config.label, origin)
    codes = [None if v is None else _class_of(v, numbers) for v in values]
    return np.array([-1 if number is None else number for number in codes], np.int64)


def _class_of(value: Value, numbers: dict[str, int]) -> int | None:
    """The class number of a label; the typed label 1.0 is the class "1", or "1.0" where the user wrote that."""
    number = numbers.get(name_of(value))
    return numbers.get(str(value)) if number is None else number


def _unknown(config: DataConfig, name: str, names: tuple[str, ...], where: str) -> DataError:
    if config.classes:
        return DataError("unknown label", where=where, found=name, allowed=names, todo=nearest(name, names))
    return DataError(
        "no row of the train split has this label, so the model has no class for it",
        where=where,
        found=name,
        allowed=names,
        todo=nearest(name, names) or "name all classes in `labels`, or drop the row",
    )


def _declared(rows: Dataset, column: str) -> tuple[str, ...]:
    """Names of the classes that the source's own column type declares."""
    feature: Any = rows.features[column] if column in rows.column_names else None
    return tuple(getattr(feature, "names", None) or ())


def _require_somewhere(config: DataConfig, raw: Raw) -> None:
    """Raise a DataError when no split has the column of labels, but the configuration names it."""
    if "label" in config.model_fields_set and not any(config.label in r.column_names for r in raw.splits.values()):
        split = "train" if "train" in raw.splits else next(iter(raw.splits))
        require_column(raw.splits[split], config.label, raw.origin(split), "label")


def _number(value: Value, origin: Origin, index: int) -> float:
    number = number_of(value)
    if abs(number) > LARGEST:
        raise DataError(
            "the number is too large: its squared error is infinite in float32",
            where=origin.where(index),
            found=value,
            allowed=f"-{LARGEST:.0e} to {LARGEST:.0e}",
            todo="scale the labels, or leave this one empty",
        )
    if math.isnan(number):
        raise DataError(
            "a regression needs a number",
            where=origin.where(index),
            found=value,
            todo="write it as a number, leave it empty, or set label_kind: class",
        )
    return number
