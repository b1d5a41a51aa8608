"""Match rows: layer maps of the papers, and combinations that are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mtkd.config.match import Match
from mtkd.errors import UserError


def pairs(students: int, teachers: int, **row: object) -> list[tuple[int, int]]:
    return Match(**{"feature": "hidden", "loss": "mse", **row}).layer_pairs(students, teachers, "match[0]")


@pytest.mark.parametrize(
    ("rule", "students", "teachers"),
    [
        ("uniform", [1, 2, 3, 4, 5, 6], [2, 4, 6, 8, 10, 12]),
        ("skip", [1, 2, 3, 4, 5], [2, 4, 6, 8, 10]),
        ("last", [1, 2, 3, 4, 5], [7, 8, 9, 10, 11]),
    ],
)
def test_maps_of_12_to_6_layers(rule: str, students: list[int], teachers: list[int]) -> None:
    """Law: the three rules give the layer maps of TinyBERT and PKD."""
    assert pairs(6, 12, student_layer="each", teacher_layer=rule) == list(zip(students, teachers, strict=True))


def test_other_maps() -> None:
    """Law: each way to state layers gives the pairs written out here."""
    assert pairs(4, 12, student_layer="each", teacher_layer="uniform") == [(1, 3), (2, 6), (3, 9), (4, 12)]
    assert pairs(3, 3, student_layer="each", teacher_layer="each") == [(1, 1), (2, 2), (3, 3)]
    assert pairs(3, 7) == [(3, 7)]
    assert pairs(3, 7, student_layer=0, teacher_layer=0) == [(0, 0)]
    assert pairs(3, 24, teacher_layer=21) == [(3, 21)]
    assert pairs(3, 10, student_layer=(1, 3), teacher_layer=(4, 9)) == [(1, 4), (3, 9)]
    assert pairs(2, 10, student_layer="each", teacher_layer=(4, 9)) == [(1, 4), (2, 9)]
    assert pairs(3, 10, student_layer="last", teacher_layer=(9,)) == [(3, 9)]
    assert pairs(3, 10, student_layer=[1], teacher_layer="last") == [(1, 10)]


def test_a_layer_is_no_negative_number() -> None:
    """Law: layers count from 0."""
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        Match(student_layer=-1)


@pytest.mark.parametrize(
    ("students", "teachers", "row", "message"),
    [
        (4, 10, {"student_layer": "each", "teacher_layer": "uniform"}, "10 teacher layers do not divide evenly over 4"),
        (4, 10, {"student_layer": "each", "teacher_layer": "skip"}, "do not divide evenly"),
        (6, 4, {"student_layer": "each", "teacher_layer": "uniform"}, "do not divide evenly"),
        (3, 4, {"student_layer": "each", "teacher_layer": "each"}, "equal depth"),
        (3, 4, {"student_layer": "each", "teacher_layer": 2}, "needs a rule"),
        (3, 4, {"teacher_layer": "uniform"}, "needs student_layer: each"),
        (3, 4, {"student_layer": (1, 2), "teacher_layer": (1, 2, 3)}, "different numbers of layers"),
        (3, 4, {"student_layer": 4}, "no such layer"),
        (3, 4, {"teacher_layer": 5}, "no such layer"),
        (3, 4, {"student_layer": (1, 2), "teacher_layer": (1, 9)}, "no such layer"),
        (6, 4, {"student_layer": "each", "teacher_layer": "last"}, "no such layer"),
        (3, 4, {"feature": "scores", "loss": "attention_mse", "teacher_layer": 0}, "no such layer"),
        (1, 4, {"student_layer": "each", "teacher_layer": "skip"}, "no layers are compared"),
        (1, 4, {"student_layer": "each", "teacher_layer": "last"}, "no layers are compared"),
        (3, 4, {"student_layer": (), "teacher_layer": ()}, "no layers are compared"),
    ],
)
def test_maps_that_cannot_be(students: int, teachers: int, row: dict[str, object], message: str) -> None:
    """Law: a map that leaves a model or drops layers is refused at its row."""
    with pytest.raises(UserError, match=message) as caught:
        pairs(students, teachers, **row)
    assert caught.value.where.startswith("match[0]")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"feature": "logits", "teacher_layer": 3}, "has no layers; drop teacher_layer"),
        ({"feature": "embedding", "student_layer": "each"}, "has no layers"),
        ({"feature": "hidden", "loss": "ce", "target": "labels"}, "labels can be compared with logits"),
        ({"feature": "hidden", "loss": "mse", "ensemble": "logits"}, "is for logits rows"),
        ({"feature": "cls", "loss": "mse", "positions": "targets"}, "is for logits rows"),
        ({"feature": "hidden", "loss": "mse", "student_layer": "uniform"}, "student_layer is"),
        ({"loss": "ce", "target": "labels", "weighted": False}, "no teachers to weight"),
        ({"loss": "ce", "target": "labels", "ensemble": "probabilities"}, "has no teachers"),
        ({"loss": "ce", "target": "labels", "positions": "all"}, "positions with a label"),
        ({"feature": "logits", "projection": "per_layer"}, "per_layer is for"),
        ({"feature": "logits", "layer_reduction": "mean"}, "has no layers"),
        ({"feature": "attention"}, "feature"),
        ({"weight": -1.0}, "greater than or equal to 0"),
        ({"weight": float("nan")}, "weight"),
        ({"wieght": 1.0}, "Extra inputs"),
    ],
)
def test_rows_that_mean_nothing_are_refused(row: dict[str, object], message: str) -> None:
    """Law: a key that its row would not read is refused."""
    with pytest.raises(ValidationError, match=message):
        Match(**row)


def test_rows_are_immutable() -> None:
    """Law: a row is frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        Match().weight = 2.0  # type: ignore[misc]
