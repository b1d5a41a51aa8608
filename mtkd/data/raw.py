"""The rows of a source before a tokenizer sees them, and what its labels are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.files import Origin, read_texts
from mtkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class FoundLabels:
    """What the labels of a source are.

    Attributes:
        kind: "class", "number" (a regression), or "" where no row has a label and nothing names the classes.
        names: of the classes, in order; () for numbers.
        why: one line.
        by_values: the values say otherwise than the type of the column: an earlier release may have.
    """

    kind: str
    names: tuple[str, ...]
    why: str
    by_values: bool = False

    @property
    def num_outputs(self) -> int:
        """Of a classifier: 1 for numbers; 0 while the classes are not known."""
        return 1 if self.kind == "number" else len(self.names)


@dataclass(frozen=True)
class Raw:
    """The rows of a source, before a tokenizer sees them.

    Attributes:
        splits: train, validation, test (those that exist) -> the source's columns; for python-stdlib `text`,
            `domain` and `name`.
        fingerprint: sha256 (hexadecimal) over the source's content in order, and over hold-out and limit if there are.
        description: one line for logs and the report.
        origins: per split, where its rows come from, for error messages.
        labels: what the labels of the whole source are, of a task that reads labels; set by `choose_rows`.
        names, domains: columns of the source's own that name its rows and their domains; "" for none.
        notes: what of the source is not read, in words.
    """

    splits: Mapping[str, Dataset]
    fingerprint: str
    description: str
    origins: Mapping[str, Origin] = field(default_factory=dict)
    labels: FoundLabels | None = None
    names: str = ""
    domains: str = ""
    notes: tuple[str, ...] = ()

    def origin(self, split: str) -> Origin:
        """Where the rows of a split come from."""
        return self.origins.get(split) or Origin(split, np.arange(len(self.splits[split])))

    def texts(self, split: str, column: str) -> list[str]:
        """The texts of a split, e.g. to train a tokenizer on; a DataError names a missing split, column or row."""
        if split not in self.splits:
            raise DataError(f"there is no {split} split", where="@data", allowed=list(self.splits))
        return read_texts(self.splits[split], column, self.origin(split), "text")
