"""`specialist` of a data entry: of a file with all labels the data of a teacher that knows some of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from mtkd.config import DataConfig
from mtkd.data.raw import Raw
from mtkd.data.sources import check_source, choose_rows, read_source
from mtkd.errors import DataError, UserError

LABELS = ["b", "a", "c", "", "d", "b", "c", "c", "d", "a"]


def chosen(folder: Path, column: list[str] = LABELS, **fields: object) -> Raw:
    for split in ("train", "test"):
        lines = [f"text {i},{label}" for i, label in enumerate(column)]
        (folder / f"{split}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    files = {split: f"{split}.csv" for split in ("train", "test")}
    config = DataConfig(source="files", files=files, task="classify", **fields)  # type: ignore[arg-type]
    check_source(config, folder)
    return choose_rows(read_source(config, folder), config)


def test_other_labels_become_one_class_in_every_split(tmp_path: Path) -> None:
    """The classes are those of the configuration, in its order; a row without a label stays without one."""
    raw = chosen(tmp_path, specialist={"classes": ["b", "a"], "other": "rest"})
    assert raw.labels is not None
    assert raw.labels.names == ("b", "a", "rest")
    wanted = ["b", "a", "rest", None, "rest", "b", "rest", "rest", "rest", "a"]
    assert raw.splits["train"]["label"][:] == raw.splits["test"]["label"][:] == wanted


def test_a_share_of_the_others_is_kept_in_the_train_split_by_the_seed(tmp_path: Path) -> None:
    """Own rows and rows without a label all stay, in order; errors still name the file's row."""
    raws = [chosen(tmp_path, specialist={"classes": ["b", "a"], "share": 0.4}, seed=seed) for seed in (0, 0, 1, 2, 3)]
    for raw in raws:
        texts, labels = raw.splits["train"]["text"][:], raw.splits["train"]["label"][:]
        assert [x for x in labels if x != "other"] == ["b", "a", None, "b", "a"]
        assert labels.count("other") == 2
        assert texts == sorted(texts)
        assert raw.origin("train").where(6).startswith(f"train.csv, row {int(texts[6].split()[1]) + 1}")
        assert len(raw.splits["test"]) == len(LABELS)
    kept = [tuple(raw.splits["train"]["text"][:]) for raw in raws]
    assert kept[0] == kept[1]
    assert len(set(kept)) > 1


def test_numbered_labels_and_a_class_that_is_called_other(tmp_path: Path) -> None:
    raw = chosen(tmp_path, ["0", "1", "2", "other", "1"], specialist={"classes": ["1"]})
    assert raw.labels is not None
    assert raw.labels.names == ("1", "other")
    assert raw.splits["train"]["label"][:] == ["other", "1", "other", "other", "1"]


def test_the_fingerprint_knows_the_specialist(tmp_path: Path) -> None:
    """Other classes, names or shares are other data; the same ones are the same."""
    fields = [
        {}, {"specialist": {"classes": ["a"]}}, {"specialist": {"classes": ["b"]}},
        {"specialist": {"classes": ["a"], "share": 0.5}}, {"specialist": {"classes": ["a"], "other": "no"}},
    ]  # fmt: skip
    prints = [chosen(tmp_path, **each).fingerprint for each in fields]
    assert len(set(prints)) == len(fields)
    assert prints[1] == chosen(tmp_path, **fields[1]).fingerprint
    values = [DataConfig(source="files", **each).values() for each in fields]  # type: ignore[arg-type]
    assert "specialist" not in values[0]
    assert values[1] != values[3]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"specialist": {"classes": ["a", "bb"]}}, "no row of the train split has this class"),
        ({"specialist": {"classes": ["a", "b", "c", "d"]}}, "is of another class"),
        ({"specialist": {"classes": ["a"]}, "labels": ["a", "b", "c"]}, "unknown label"),
    ],
)
def test_classes_that_the_data_does_not_have_are_refused(fields: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        chosen(tmp_path, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"specialist": {"classes": []}}, "at least one"),
        ({"specialist": {"classes": ["a", "a"]}}, "once"),
        ({"specialist": {"classes": ["a"], "other": "a"}}, "both a class"),
        ({"specialist": {"classes": ["a"], "share": 0}}, "greater than 0"),
        ({"specialist": {"classes": ["a"]}, "label_kind": "number"}, "no classes"),
        ({"specialist": {"classes": ["z"]}, "labels": ["a", "b"]}, "not in labels"),
    ],
)
def test_what_makes_no_specialist_is_refused_with_the_configuration(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(source="files", task="classify", **fields)


def test_only_classification_has_specialists(tmp_path: Path) -> None:
    config = DataConfig(source="files", files={"train": "train.csv"}, specialist={"classes": ["a"]})  # type: ignore
    with pytest.raises(UserError, match="does not read this") as caught:
        check_source(config, tmp_path)
    assert "classify" in caught.value.todo
