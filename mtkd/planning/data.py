"""Read the `data` entries when a run is planned: classes, kind of label, rows per split.

The interface::

    reader = DataReader(config.base)        # one per run and process; each source is read once
    raw = reader.raw(data)                  # rows after hold-out and limit: the same object for plan and run
    facts = reader.facts("NAME", data)      # DataFacts: kind, classes (in order), num_labels, why, rows, labelled
    unread(data)                            # DataFacts from the configuration alone: while a chain is resolved
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mtkd.config import DataConfig
from mtkd.data.batch import NO_LABEL
from mtkd.data.files import read_texts
from mtkd.data.hub import NotReached
from mtkd.data.labels import label_values, read_labels
from mtkd.data.progress import Working
from mtkd.data.raw import Raw
from mtkd.data.sources import choose_rows, read_source
from mtkd.errors import DataError
from mtkd.planning.places import placed
from mtkd.registry import TASKS


@dataclass(frozen=True)
class DataFacts:
    """The facts of a `data` entry.

    Attributes:
        kind: "class", "number" (a regression), or "" for tasks without labels and while nothing is known.
        classes: class names in order; () for numbers and token tasks.
        why: how the kind was found, one line.
        rows: split -> number of rows, after hold-out and limit; {} while the source was not read.
        labelled: split -> rows with a label; {} for tasks without labels.
        not_here: why the source cannot be read now (a hub that is not reached); "" otherwise.
    """

    kind: str = ""
    classes: tuple[str, ...] = ()
    why: str = ""
    rows: Mapping[str, int] = field(default_factory=dict)
    labelled: Mapping[str, int] = field(default_factory=dict)
    not_here: str = ""

    @property
    def known(self) -> bool:
        """Whether the number of a classifier's outputs is known."""
        return bool(self.kind)

    @property
    def num_labels(self) -> int:
        """Outputs of a classifier: classes, or 1 for numbers; 0 for token tasks and while nothing is known."""
        return 1 if self.kind == "number" else len(self.classes)


def unread(data: DataConfig) -> DataFacts:
    """The facts that the configuration alone gives."""
    return DataFacts("class" if data.classes else "", data.classes, "named in the configuration" * bool(data.classes))


class DataReader:
    """The `data` entries of a run as rows and as facts; each source is read once.

    Args:
        base: folder of the YAML file.
    """

    def __init__(self, base: Path) -> None:
        self._base = base
        self._sources: dict[str, Raw] = {}
        self._chosen: dict[str, Raw] = {}
        self._facts: dict[str, DataFacts] = {}

    def raw(self, data: DataConfig) -> Raw:
        """The rows of an entry after hold-out and limit.

        Raises:
            UserError, DataError: naming the file and row where there is one.
        """
        key = data.model_dump_json() + data.state  # what a stage writes is there after it
        if key not in self._chosen:
            source = data.model_dump_json(exclude={"labels", "specialist"}) + data.state
            if source not in self._sources:
                self._sources[source] = read_source(data, self._base)
            self._chosen[key] = choose_rows(self._sources[source], data)
        return self._chosen[key]

    def facts(self, name: str, data: DataConfig) -> DataFacts:
        """The facts of an entry: from its rows, or from the configuration alone where the hub is not reached.

        Args:
            name: of the entry, for messages.
        Raises:
            UserError, DataError: as for `raw`, and for labels that make no classes.
        """
        key = data.model_dump_json()
        if key not in self._facts:
            self._facts[key] = self._read(name, data)
        return self._facts[key]

    def known(self) -> dict[str, DataFacts]:
        """The facts so far, by the values of their entry, for the readers of other processes."""
        return dict(self._facts)

    def adopt(self, facts: Mapping[str, DataFacts]) -> None:
        """Take facts that the reader of another process found: to check every row once is enough."""
        self._facts |= facts

    def _read(self, name: str, data: DataConfig) -> DataFacts:
        try:
            with placed(data=f"data.{name}"):
                return self._facts_of(name, data)
        except NotReached as error:
            facts = unread(data)
            return DataFacts(facts.kind, facts.classes, facts.why, not_here=f"data.{name}: {error.message}")

    def _facts_of(self, name: str, data: DataConfig) -> DataFacts:
        raw = self.raw(data)
        rows = {split: len(each) for split, each in raw.splits.items()}
        with Working(f"checking texts and labels of data.{name}", sum(rows.values())) as working:
            _check_texts(data, raw)
            working.at(sum(rows.values()) // 2)
            labelled = _labelled(data, raw) if raw.labels is not None else {}
        if raw.labels is not None:
            return DataFacts(raw.labels.kind, raw.labels.names, raw.labels.why, rows, labelled)
        names, number = TASKS.find(data.task, f"data.{name}.task").labels(data, raw)  # of a plug-in
        return DataFacts("class" if names else "number" if number == 1 else "", names, "", rows)


def _check_texts(data: DataConfig, raw: Raw) -> None:
    """Raise a DataError for the first row that holds no text where the task reads one.

    A split whose prompts, clozes or texts are all empty is refused too: the model would read the template alone.
    """
    needed = data.prompt_columns or tuple(filter(None, (*data.text_columns, data.text_pair)))
    for split, rows in raw.splits.items():
        filled = False
        for column in filter(None, (*data.text_columns, data.text_pair)):
            texts = read_texts(rows, column, raw.origin(split), "text")
            filled = filled or (column in needed and any(text.strip() for text in texts))
        if not filled:
            what = "prompt" if data.prompt is not None else "cloze" if data.cloze is not None else "text"
            raise DataError(
                f"no row has a text for the {what}" if what != "text" else "no row has a text",
                where=raw.origin(split).name,
                found=f"{len(rows)} rows, nothing in {', '.join(needed)}",
                todo=f"set data.NAME.{what} to a column with texts" + (", or drop it" if what == "prompt" else ""),
            )


def _labelled(data: DataConfig, raw: Raw) -> dict[str, int]:
    """Count the rows with a label, by split; a DataError names one that is neither a class nor a number."""
    assert raw.labels is not None
    if not raw.labels.kind:
        return {s: sum(v is not None for v in label_values(rows, data.label, raw.origin(s)))
                for s, rows in raw.splits.items()}  # fmt: skip
    counts = {}
    for split, rows in raw.splits.items():
        labels = read_labels(data, rows, raw.origin(split), raw.labels.names)
        missing = labels == NO_LABEL if raw.labels.names else np.isnan(labels)
        counts[split] = len(rows) - int(missing.sum())
    return counts
