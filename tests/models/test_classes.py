"""Which output of a classifier is which class of the data, and what is refused."""

from __future__ import annotations

import pytest
import torch
from model_bank import LENGTHS, NUM_IDS, build, description
from tiny import class_batch
from transformers import BertConfig

from mtkd.errors import DataError, UserError
from mtkd.models.classes import ClassMap, check_softmax, match_classes, output_names
from mtkd.models.info import CLASSIFIER
from mtkd.models.taps import TappedModel

DATA = ("negative", "positive")


@pytest.mark.parametrize(
    ("outputs", "classes", "columns", "how"),
    [
        (("negative", "positive"), DATA, (0, 1), "name"),
        (("positive", "negative"), DATA, (1, 0), "name"),
        (("POSITIVE", "NEGATIVE"), DATA, (1, 0), "name"),
        (("not entailed", "Entailed"), ("entailed", "not_entailed"), (1, 0), "name"),
        (("card-lost", "top up"), ("top_up", "Card Lost"), (1, 0), "name"),
        (("LABEL_0", "LABEL_1"), DATA, (0, 1), "position"),
        (("", ""), DATA, (0, 1), "position"),
        (("NEGATIVE", "POSITIVE"), ("0", "1"), (0, 1), "position"),
        (("1", "0"), ("0", "1"), (1, 0), "name"),
        (("LABEL_1", "LABEL_0"), ("LABEL_0", "LABEL_1"), (1, 0), "name"),
    ],
)
def test_names_are_matched_where_they_mean_something(
    outputs: tuple[str, ...], classes: tuple[str, ...], columns: tuple[int, ...], how: str
) -> None:
    """Case, spaces, `_` and `-` do not matter; names without a meaning are matched by position."""
    found = match_classes(outputs, classes, "teacher")
    assert (found.columns, found.how) == (columns, how)


@pytest.mark.parametrize("outputs", [("neg", "pos"), ("negative", "neutral"), ("negative", "positive", "neutral")])
def test_other_names_are_refused_with_both_lists_and_the_line_to_write(outputs: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        match_classes(outputs, DATA, "stages.s.teachers[0]")
    assert all(name in str(caught.value) for name in (*outputs, *DATA))
    assert "classes: [negative" in caught.value.todo


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (("positive", None, "negative"), (2, 0)),
        ({"pos": "positive", "NEG": "Negative"}, (2, 0)),
        ({"0": "positive", "2": "negative", "1": None}, (2, 0)),
    ],
)
def test_the_user_says_which_output_is_which(given: object, columns: tuple[int, ...]) -> None:
    """A list has a class or null per output; a mapping names outputs, or numbers them."""
    found = match_classes(("pos", "neutral", "neg"), DATA, "teacher", given)  # type: ignore[arg-type]
    assert (found.columns, found.how, found.in_order) == (columns, "given", False)
    assert "1: neutral is dropped before the softmax" in found.note


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("positive", "negative"), "an entry per output"),
        (("positive", None, None), "no output of the model stands for"),
        (("positive", "positive", "negative"), "two outputs"),
        (("positive", "bad", "negative"), "no such class"),
        ({"pos": "positive", "nag": "negative"}, "no such output"),
        ({"pos": "positive", "0": "negative"}, "named twice"),
    ],
)
def test_what_the_user_says_must_fit(given: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        match_classes(("pos", "neutral", "neg"), DATA, "stages.s.teachers[0]", given)  # type: ignore[arg-type]
    assert caught.value.where == "stages.s.teachers[0].classes"


def test_the_plan_shows_both_sides() -> None:
    note = match_classes(("LABEL_0", "LABEL_1"), DATA, "teacher").note
    assert note == "0: LABEL_0 = negative, by position; 1: LABEL_1 = positive, by position"
    assert match_classes(DATA, DATA, "teacher").note == ""


@pytest.mark.parametrize(
    ("config", "num_labels", "message"),
    [
        (BertConfig(num_labels=2, problem_type="multi_label_classification"), 2, "sigmoid"),
        (BertConfig(num_labels=1), 2, "predicts a number"),
        (BertConfig(num_labels=2, problem_type="regression"), 2, "predicts a number"),
        (BertConfig(num_labels=1, problem_type="multi_label_classification"), 1, "sigmoid"),
    ],
)
def test_outputs_that_are_no_distribution_are_refused(config: BertConfig, num_labels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_softmax(config, num_labels, "teacher")


def test_dropped_outputs_never_reach_the_softmax() -> None:
    """The probabilities are those of the kept outputs alone: p_i / sum of the kept p."""
    model = build(description("bert"), CLASSIFIER, num_labels=3)
    kept_two = ClassMap(("x", "y", "z"), ("z", "x"), (2, 0), "name")
    whole, some = (TappedModel(model, CLASSIFIER, NUM_IDS, None, classes) for classes in (None, kept_two))
    some.verify()
    batch, wants = class_batch(LENGTHS), frozenset({"logits"})
    with torch.no_grad():
        every = whole(batch, wants)["logits"].rows(torch.arange(len(LENGTHS))).double().softmax(-1)
        kept = some(batch, wants)["logits"].rows(torch.arange(len(LENGTHS))).double().softmax(-1)
    torch.testing.assert_close(kept, every[:, [2, 0]] / every[:, [2, 0]].sum(-1, keepdim=True))
    assert (some.info.num_labels, some.num_columns) == (2, 2)


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert", "gpt2", "llama", "glm_blocklm"])
def test_a_student_that_comes_with_classes_gets_the_datas_order(
    architecture: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Class by class its logits are those of the folder, whatever `architectures` says there."""
    folder = tmp_path_factory.mktemp("model")
    build(description(architecture), CLASSIFIER, label_names=("no", "yes", "maybe")).save_pretrained(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"architectures"', '"other"'))
    before = build(str(folder), CLASSIFIER, label_names=("no", "yes", "maybe"))
    after = build(str(folder), CLASSIFIER, label_names=("Yes", "MAYBE", "no"))
    assert output_names(after.config) == ("Yes", "MAYBE", "no")
    batch, wants = class_batch(LENGTHS), frozenset({"logits"})
    logits = []
    for model in (before, after):
        with torch.no_grad():
            found = TappedModel(model, CLASSIFIER, NUM_IDS)(batch, wants)["logits"]
        logits.append(found.rows(torch.arange(len(LENGTHS))))
    torch.testing.assert_close(logits[1], logits[0][:, [1, 2, 0]], rtol=1e-4, atol=1e-6)
