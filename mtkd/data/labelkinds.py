"""Whether a column of labels names classes or measures something, decided from its distinct values.

The rules of `label_kind: auto`, in order; nothing is read as a number that is not written as one:

    declared by the source, booleans               classes
    typed numbers  whole, type integer             classes
                   whole, type float               classes where few or 0 to n-1, else numbers
                   some with a fraction            numbers
    text           all plain decimals, in one way  as typed numbers (integers: classes)
                   anything else                   classes, by the text as it is written

A plain decimal is `-12`, `0.5` or `1e-05`: no plus sign, no leading zeros, no underscore, ASCII digits. Codes such
as `007`, `5E10`, `1_000`, `1.10` next to `1.2`, or `1` next to `1.0` are text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from mtkd.errors import DataError

Value = str | int | float

FEW = 20
"""Distinct whole numbers of a float column up to which they are classes."""

_PLAIN = re.compile(r"-?(0|[1-9][0-9]{0,300})(\.[0-9]+)?(e[+-][0-9]{2,3})?")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_ORDERED = re.compile(r"[+-]?\d{1,300}(\.\d{1,300})?")
_TRAILING_ZERO = re.compile(r"\.[0-9]+0")
_NOT_FINITE = ("nan", "inf", "-inf", "+inf", "infinity", "-infinity")


@dataclass(frozen=True)
class Kind:
    """`class` or `number`, why, and whether the type of the column alone would say otherwise."""

    name: str
    why: str
    by_values: bool = False


def kind_of(counts: Mapping[Value, int], where: Callable[[str], str]) -> Kind:
    """The kind of some labels.

    Args:
        counts: distinct values (text stripped) -> rows that have it.
        where: text -> place of a row that has it.

    Raises:
        DataError: numbers next to `nan`, or a column of which no rule can tell.
    """
    values = list(counts)
    if all(isinstance(value, bool) for value in values):
        return Kind("class", "true and false: classes")
    if all(isinstance(value, str) for value in values):
        return _kind_of_text({str(value): count for value, count in counts.items()}, where)
    if all(isinstance(value, int) for value in values):
        return Kind("class", _whole(counts))
    return _kind_of_numbers({float(value): count for value, count in counts.items()})


def name_of(value: Value) -> str:
    """A class as text: 1 and 1.0 are the class "1", True is "true"; text is itself, without spaces around it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.strip() if isinstance(value, str) else str(value)


def in_order(names: Iterable[str]) -> list[str]:
    """Names of classes sorted: by number when all are written as numbers, else as text."""
    every = list(names)
    if all(_ORDERED.fullmatch(name) for name in every):
        return sorted(every, key=lambda name: (Decimal(name), name))
    return sorted(every)


def number_of(value: Value) -> float:
    """A label of a regression; NaN for what is not written as a finite number."""
    if isinstance(value, bool):
        return math.nan
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return math.nan
    number = float(value)
    return number if math.isfinite(number) else math.nan


def _kind_of_text(counts: Mapping[str, int], where: Callable[[str], str]) -> Kind:
    plain = [text for text in counts if _PLAIN.fullmatch(text)]
    other = [text for text in counts if not _PLAIN.fullmatch(text)]
    if plain and other and all(text.lower() in _NOT_FINITE for text in other):
        raise DataError(
            "the labels are numbers but for some that are none",
            where=where(other[0]),
            found=", ".join(other),
            todo="leave the label empty where there is none, or set label_kind: class",
        )
    if other:
        _check_codes(counts, len(plain), where)
        return Kind(
            "class",
            f"text: classes; {_some(other)} is no plain number" if plain else "text: classes",
            _read_by_float(counts),
        )
    if not any("." in text or "e" in text for text in plain):
        return Kind("class", _whole(counts))
    twice = _written_twice(plain)
    decimals = {len(text.partition(".")[2]) for text in plain}
    untidy = [text for text in plain if _TRAILING_ZERO.search(text) and len(decimals) > 1]
    if twice or untidy:
        _check_codes(counts, len(plain), where)
        shown = f"{twice[0]} and {twice[1]} are one number in two writings" if twice else f"{untidy[0]} ends in a zero"
        return Kind("class", f"text: classes as they are written; {shown}", by_values=True)
    return _kind_of_numbers({float(text): count for text, count in counts.items()})


def _kind_of_numbers(counts: Mapping[float, int]) -> Kind:
    fractions = [value for value in counts if not value.is_integer()]
    shown = f"{len(counts):,} different, such as {_some(sorted(fractions or counts))}"
    if fractions:
        return Kind("number", f"numbers with a fraction ({shown}): a regression; else set label_kind: class")
    indices = set(counts) == set(map(float, range(len(counts)))) and sum(counts.values()) >= 2 * len(counts)
    if len(counts) <= FEW or indices:
        return Kind("class", f"few whole numbers ({shown}): classes; else set label_kind: number", by_values=True)
    return Kind("number", f"many whole numbers with a point ({shown}): a regression; else set label_kind: class")


def _whole(counts: Mapping[Value, int] | Mapping[str, int]) -> str:
    rows = sum(counts.values())
    many = len(counts) > FEW and len(counts) * 2 > rows
    return "whole numbers: classes" + (
        f", {len(counts):,} different in {rows:,} rows; if they measure something set label_kind: number" * many
    )


def _check_codes(counts: Mapping[str, int], num_plain: int, where: Callable[[str], str]) -> None:
    """Refuse a column of almost as many labels as rows, most of them plain numbers: neither reading is safe."""
    rows = sum(counts.values())
    if len(counts) > FEW and len(counts) * 2 > rows and num_plain * 2 > len(counts):
        raise DataError(
            "the labels are numbers or codes, and the values do not tell which",
            where=where(next(text for text in counts if _PLAIN.fullmatch(text))),
            found=f"{len(counts):,} different in {rows:,} rows, such as {_some(sorted(counts, key=len)[-3:])}",
            todo="set label_kind: number or label_kind: class",
        )


def _read_by_float(texts: Iterable[str]) -> bool:
    """Whether Python reads every text as a number, and one at least as no whole one: codes once taken for numbers."""
    every = list(texts)
    try:
        _ = [float(text) for text in every]
    except ValueError:
        return False
    return not all(text.lstrip("+-").isdecimal() for text in every)


def _written_twice(texts: Iterable[str]) -> tuple[str, str] | None:
    seen: dict[float, str] = {}
    for text in texts:
        first = seen.setdefault(float(text), text)
        if first != text:
            return first, text
    return None


def _some(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in list(values)[:3])
