"""Rows compiled against models: what is refused at plan time, and which features and positions a row reads."""

from __future__ import annotations

import dataclasses

import pytest

from mtkd.config.match import Match
from mtkd.errors import UserError
from mtkd.models.features import ATTENTION
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import Row, compile_rows

PLAIN = frozenset({"logits", "hidden", "embedding", "cls"})
STUDENT = ModelInfo(
    architecture="llama",
    num_layers=2,
    width=96,
    num_heads=12,
    num_kv_heads=12,
    head_width=8,
    vocabulary=100,
    num_labels=0,
    max_positions=64,
    causal=True,
    taps=PLAIN | set(ATTENTION),
)
TEACHER = dataclasses.replace(STUDENT, num_layers=4)
WIDE = dataclasses.replace(TEACHER, num_heads=16, num_kv_heads=16, width=144, head_width=9)


def compiled(
    *matches: Match,
    student: ModelInfo = STUDENT,
    teacher: ModelInfo = TEACHER,
    token_level: bool = True,
    regression: bool = False,
) -> list[Row]:
    teachers = {"big": teacher}
    return compile_rows(
        matches, student, teachers, token_level=token_level, regression=regression, where="stages.s.match"
    )


def refused(message: str, match: Match, **settings: object) -> UserError:
    with pytest.raises(UserError, match=message) as caught:
        compiled(Match(feature="hidden", loss="mse"), match, **settings)  # type: ignore[arg-type]
    assert caught.value.where.startswith("stages.s.match[1]")
    return caught.value


def relation(feature: str, **options: object) -> Match:
    return Match(feature=feature, loss="relation_kl", options=options)


@pytest.mark.parametrize("feature", ["query", "key", "value"])
def test_relation_heads_allow_other_head_counts(feature: str) -> None:
    """`heads` cuts the width of both sides: it must divide both, and replaces the models' own counts."""
    assert compiled(relation(feature, heads=48), teacher=WIDE)[0].pairs == (((2, 4),),)
    refused("needs equal head counts", relation(feature), teacher=WIDE)
    refused("student's .* width 96", relation(feature, heads=9), teacher=WIDE)
    refused("teacher 'big''s .* width 144", relation(feature, heads=32), teacher=WIDE)
    error = refused("not negative", relation(feature, heads=-4))
    assert error.where == "stages.s.match[1].options.heads"


def test_maps_of_unequal_heads_are_refused() -> None:
    refused("needs equal head counts", Match(feature="scores", loss="attention_mse"), teacher=WIDE)
    refused("needs equal head counts", Match(feature="probs", loss="attention_kl"), teacher=WIDE)


def test_grouped_keys_count_as_heads_of_key_and_value_only() -> None:
    grouped = dataclasses.replace(TEACHER, num_kv_heads=4)
    refused("needs equal head counts", relation("key"), teacher=grouped)
    refused("teacher 'big''s value width 32", relation("value", heads=48), teacher=grouped)
    for match in (relation("query"), Match(feature="scores", loss="attention_mse"), relation("key", heads=16)):
        assert compiled(match, teacher=grouped)


def test_maps_of_a_causal_and_another_model_are_refused() -> None:
    refused(
        "attend differently",
        Match(feature="probs", loss="attention_kl"),
        teacher=dataclasses.replace(TEACHER, causal=False),
    )


def test_features_a_model_cannot_give() -> None:
    """The refusal names the side, and the teacher's architecture."""
    without = dataclasses.replace(TEACHER, architecture="deberta", taps=PLAIN)
    match = Match(feature="scores", loss="attention_mse")
    assert "deberta" in refused("cannot come from the teacher 'big'", match, teacher=without).message
    refused("cannot come from the student", match, student=dataclasses.replace(STUDENT, taps=PLAIN))
    refused("cannot come from the student", Match(feature="nsp_logits", loss="kl"))


def test_losses_and_options_that_do_not_exist() -> None:
    error = refused("unknown loss", Match(loss="reverse_lk"))
    assert (error.where, error.todo) == ("stages.s.match[1].loss", "did you mean 'reverse_kl'?")
    error = refused("unknown option", Match(options={"temprature": 2.0}))
    assert error.todo == "did you mean 'temperature'?"
    refused("unknown option", Match(options={"margin": 1.0}))
    refused("wrong type", Match(options={"temperature": "hot"}))
    refused("wrong type", Match(options={"scale": 1}))
    assert compiled(Match(options={"temperature": 2}))  # an int where a float is meant


@pytest.mark.parametrize(
    ("match", "message"),
    [
        (Match(options={"temperature": 0.0}), "temperature must be positive"),
        (Match(loss="jsd", options={"beta": 1.5}), "beta must be between"),
        (Match(loss="ce", target="labels", options={"smoothing": 2.0}), "smoothing must be between"),
    ],
)
def test_values_a_loss_refuses_are_found_before_training(match: Match, message: str) -> None:
    assert refused(message, match).where == "stages.s.match[1].options"


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd", "soft_ce", "mse", "normalized_mse", "cosine"])
def test_options_of_every_loss_on_logits_can_be_tried(loss: str) -> None:
    options = {} if loss in ("mse", "cosine") else {"sum_over_width": True} if "norm" in loss else {"scale": False}
    assert compiled(Match(loss=loss, options=options))


def test_losses_that_do_not_fit_the_row() -> None:
    """By feature, by target, by ensemble: a loss that cannot read them is refused."""
    refused("cannot read feature 'hidden'", Match(feature="hidden", loss="kl"))
    refused("cannot read feature 'logits'", Match(loss="attention_kl"))
    refused("compares with labels", Match(loss="ce"))
    refused("compares with teacher", Match(loss="kl", target="labels"))
    refused("compares logits as vectors", Match(loss="mse", ensemble="probabilities"))
    assert compiled(Match(loss="mse", ensemble="logits"), Match(loss="jsd", ensemble="probabilities"))


def test_layers_are_checked_for_each_teacher() -> None:
    hidden = {"feature": "hidden", "loss": "mse"}
    refused("no such layer", Match(**hidden, teacher_layer=5))
    odd = dataclasses.replace(TEACHER, num_layers=5)
    refused("do not divide", Match(**hidden, student_layer="each", teacher_layer="uniform"), teacher=odd)
    both = {"small": TEACHER, "big": dataclasses.replace(TEACHER, num_layers=8)}
    match = Match(**hidden, student_layer="each", teacher_layer="uniform")
    (row,) = compile_rows([match], STUDENT, both, token_level=True, regression=False, where="match")
    assert row.pairs == (((1, 2), (2, 4)), ((1, 4), (2, 8)))
    assert row.student_wants() == {"hidden.1", "hidden.2"}
    assert [row.teacher_wants(k) for k in range(2)] == [{"hidden.2", "hidden.4"}, {"hidden.4", "hidden.8"}]


CLASSES = {
    "student": dataclasses.replace(STUDENT, num_labels=2),
    "teacher": dataclasses.replace(TEACHER, num_labels=2),
    "token_level": False,
}
NUMBER = {**CLASSES, "regression": True}


def test_classification_rows() -> None:
    """Student and teacher have as many classes; positions and numeric losses are refused."""
    refused("another number of classes", Match(), **{**CLASSES, "teacher": dataclasses.replace(TEACHER, num_labels=3)})
    refused("positions is for token tasks", Match(positions="all"), **CLASSES)
    refused("label_mse needs numeric labels", Match(loss="label_mse", target="labels"), **CLASSES)
    assert len(compiled(Match(), Match(loss="ce", target="labels"), **CLASSES)) == 2  # type: ignore[arg-type]


def test_regression_rows() -> None:
    """Divergences and class losses are refused for a number; losses of vectors are not."""
    refusals = {"needs at least two classes": Match(), "needs class labels": Match(loss="ce", target="labels")}
    for message, match in refusals.items():
        with pytest.raises(UserError, match=message):
            compiled(match, **NUMBER)  # type: ignore[arg-type]
    assert compiled(Match(loss="mse"), Match(loss="label_mse", target="labels"), **NUMBER)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("match", "at_tokens", "at_classes"),
    [
        (Match(), "targets", "sequences"),
        (Match(loss="ce", target="labels"), "labels", "targets"),
        (Match(positions="all"), "tokens", None),
        (Match(positions="targets"), "targets", None),
        (Match(feature="hidden", loss="mse"), "tokens", "tokens"),
        (Match(feature="embedding", loss="mse"), "tokens", "tokens"),
        (Match(feature="cls", loss="mse"), "sequences", "sequences"),
        (Match(feature="scores", loss="attention_mse"), "tokens", "tokens"),
    ],
)
def test_positions_a_row_counts(match: Match, at_tokens: str, at_classes: str | None) -> None:
    """What a row's sum is divided by: targets, labels, tokens or sequences, by feature and task."""
    assert compiled(match)[0].counted(True) == at_tokens
    if at_classes is not None:
        assert compiled(match, **CLASSES)[0].counted(False) == at_classes  # type: ignore[arg-type]


def test_what_rows_want() -> None:
    """The features a row asks of each side, and the key its metric has."""
    soft, hard, scores = compiled(
        Match(), Match(loss="ce", target="labels"), Match(feature="scores", loss="attention_mse")
    )
    assert (soft.student_wants(), soft.teacher_wants(0)) == ({"logits"}, {"logits"})
    assert (hard.student_wants(), hard.teacher_wants(0), hard.pairs) == ({"logits"}, set(), ())
    assert (scores.student_wants(), scores.teacher_wants(0)) == ({"scores.2"}, {"scores.4"})
    assert [row.key for row in (soft, hard, scores)] == ["0:logits:kl", "1:logits:ce", "2:scores:attention_mse"]
