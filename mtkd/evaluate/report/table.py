"""Tables as plain data, the same for the page and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mtkd.evaluate.report.read import number
from mtkd.evaluate.report.wording import count_text, value_text


@dataclass(frozen=True)
class Cell:
    """One table cell: what is shown, the exact value as its tooltip, and a style class."""

    text: str
    exact: str = ""
    style: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a header, or under (group, number of columns) over a header; `note` explains the columns."""

    header: list[str]
    rows: list[list[Cell]]
    groups: list[tuple[str, int]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold numbers."""
        return ["n" in cell.style.split() for cell in self.rows[0]] if self.rows else [False] * len(self.header)


def count_cell(value: Any) -> Cell:
    """A number of things."""
    return Cell(count_text(value), exact_text(value), "n")


def value_cell(value: Any) -> Cell:
    """A measured value."""
    return Cell(value_text(value), exact_text(value), "n")


def exact_text(value: Any) -> str:
    """Every digit, for the tooltip."""
    return "" if number(value) is None else repr(value)
