"""`skip`: two entries of one seed share no row, and together they are what neither leaves out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from data_examples import load_raw

from mtkd.config import DataConfig
from mtkd.errors import UserError

ROWS = 90
"""60 of class a, 30 of class b."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    lines = [f"text {n}\t{'aab'[n % 3]}" for n in range(ROWS)]
    (tmp_path / "train.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return tmp_path


def texts(base: Path, task: str = "classify", **fields: object) -> list[str]:
    values = {"source": "files", "files": {"train": "train.tsv"}, "task": task, **fields}
    return list(load_raw(DataConfig.model_validate(values), base).splits["train"]["text"])


@pytest.mark.parametrize("task", ["classify", "causal-lm"])
@pytest.mark.parametrize("cut", [1, 20, 31, 89])
def test_a_limit_and_its_skip_share_no_row_and_leave_none_out(base: Path, task: str, cut: int) -> None:
    """Law: limit n and skip n of one seed divide the rows."""
    first, rest = texts(base, task, limit={"train": cut}), texts(base, task, skip={"train": cut})
    assert len(first) == cut
    assert sorted(first + rest) == sorted(texts(base, task))


def test_a_limit_comes_after_the_skip(base: Path) -> None:
    """Law: slices of 30 rows share none, and every class keeps its share in each."""
    slices = [texts(base, skip={"train": s} if s else {}, limit={"train": 30}) for s in (0, 30)]
    assert all(len(rows) == 30 for rows in slices)
    assert not set(slices[0]) & set(slices[1])
    for rows in slices:
        assert Counter("aab"[int(row.split()[1]) % 3] for row in rows) == {"a": 20, "b": 10}
    assert texts(base, skip={"train": 80}, limit={"train": 30}) == texts(base, skip={"train": 80})


def test_what_skip_leaves_is_other_data(base: Path) -> None:
    """Law: the fingerprint knows the skip, and is what it was without one."""
    values = {"source": "files", "files": {"train": "train.tsv"}, "task": "classify", "limit": {"train": 30}}
    prints = {
        load_raw(DataConfig.model_validate({**values, "skip": skip}), base).fingerprint
        for skip in ({}, {"train": 30}, {"train": 60})
    }
    assert len(prints) == 3
    assert "skip" not in DataConfig.model_validate(values).values()


@pytest.mark.parametrize(("skip", "found"), [({"train": 90}, "no row is left"), ({"test": 1}, "no such split")])
def test_a_skip_of_everything_or_of_no_split_is_refused(base: Path, skip: dict[str, int], found: str) -> None:
    """Law: a run of no rows is refused at its place."""
    with pytest.raises(UserError, match=found) as error:
        texts(base, skip=skip)
    assert error.value.where == f"@data.skip.{next(iter(skip))}"
