"""The column that names each row's teacher: from the data to the batch, and what it is told when it is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from data_examples import sentences

from mtkd.data.load import LoadedData
from mtkd.errors import DataError

Loader = Callable[..., LoadedData]
NAMES = ["law", "code", "law", "news", "code"]


@pytest.mark.parametrize("task", ["causal-lm", "masked-lm", "classify"])
def test_every_example_carries_the_number_of_its_rows_teacher(load: Loader, task: str) -> None:
    columns = {"text": sentences(5, longest=40), "expert": NAMES}
    columns |= {"label": ["x", "y", "x", "y", "x"]} if task == "classify" else {}
    split = load(columns, task=task, teacher="expert", max_length=16).splits["train"]
    routed = split.routed(("news", "law", "code"), "stages.student.weighting")
    every = list(range(len(split)))
    batch = routed.collate(every, size=len(every) + 2)
    wanted = [("news", "law", "code").index(NAMES[document]) for document in split.documents]
    assert batch.routes is not None
    assert batch.routes.tolist() == [*wanted, -1, -1]
    assert split.collate(every).routes is None  # other stages on the same data see no routes
    assert batch.to(batch.keys.device).routes is not None


def test_blank_rows_do_not_shift_the_names(load: Loader) -> None:
    split = load({"text": ["one", " ", "two"], "teacher": ["a", "a", "b"]}).splits["train"]
    assert split.routed(("a", "b"), "here").collate([0, 1]).routes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({}, ("no column names a teacher", "data.NAME.teacher")),
        ({"teacher": ["a", "b", "lwa"]}, ("does not have", "row 'train:3'", "lwa", "law", "did you mean 'law'?")),
        ({"teacher": ["a", None, "law"]}, ("names no teacher", "row 'train:2'")),
    ],
)
def test_a_row_without_a_known_teacher_is_refused(load: Loader, columns: dict, texts: tuple[str, ...]) -> None:
    split = load({"text": sentences(3), **columns}).splits["train"]
    with pytest.raises(DataError) as caught:
        split.routed(("a", "b", "law"), "stages.student.weighting")
    for text in ("stages.student.weighting", *texts):
        assert text in str(caught.value)
