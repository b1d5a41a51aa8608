"""Long work says how far it is: what a person sees of a large file, and what is read of it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from mtkd.data import progress
from mtkd.data.files import values_of
from mtkd.data.progress import Working, counted


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plain lines, of work that takes a second from one look at the clock to the next."""
    lines, clock = list[str](), iter(range(10_000))
    monkeypatch.setattr(progress, "say", lines.append)
    # Not in the module `time` itself: a thread of xdist looks at the same clock.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    monkeypatch.setenv("RANK", "0")
    # An error that another test keeps may hold a generator open, and with it the work that it was a part of.
    monkeypatch.setattr(Working, "_outer", None)
    return lines


def test_work_that_takes_long_says_so_and_how_long_it_took(said: list[str]) -> None:
    """Law: every item once; a first line after a second, then one in ten seconds, and one at the end."""
    assert list(counted("abcdefghijkl", "reading", 12, each=1)) == list("abcdefghijkl")
    assert said[0] == "reading: 1 of 12 rows, 1 s so far"
    assert said[1].startswith("reading: 12 of 12 rows")
    assert said[2].startswith("reading: done in")


def test_work_within_other_work_is_silent(said: list[str]) -> None:
    """Law: one line for one phase, and a terminal has one bar at a time; also after an error within."""
    with Working("outer", 2) as outer:
        list(counted(range(5), "inner", 5, each=1))
        with pytest.raises(KeyError), Working("inner", 2):
            raise KeyError
        outer.at(1)
    assert [line.split(":")[0] for line in said] == ["outer", "outer"]
    list(counted(range(5), "afterwards", 5, each=1))
    assert said[-1].startswith("afterwards: done in")


@pytest.mark.parametrize("kept", [0, 1, 3, 40, 60])
def test_a_column_is_what_its_selected_rows_are(kept: int) -> None:
    """Law: the values of a selection, however much of the table it is, as `datasets` gives them."""
    from datasets import ClassLabel, Dataset, concatenate_datasets

    columns = {"text": [f"row {i}" if i % 7 else None for i in range(60)], "label": [i % 3 for i in range(60)]}
    parts = [Dataset.from_dict({k: v[a : a + 30] for k, v in columns.items()}) for a in (0, 30)]
    rows = concatenate_datasets(parts).add_column("list", [[i] for i in range(60)])  # type: ignore[call-arg]
    rows = rows.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    order = np.random.default_rng(0).permutation(60)[:kept]
    for selected in (rows.select(order), rows.select(np.sort(order)).select(range(kept)), rows):
        for column in ("text", "label", "list"):
            assert values_of(selected, column) == selected[column][:]
