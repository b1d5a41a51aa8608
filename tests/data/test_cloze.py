"""Rows as clozes: the template around the columns, the blank never cut off, and the words of the classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig
from mtkd.data.blanks import answer_ids
from mtkd.data.glm_tokens import trained_tokenizer
from mtkd.data.load import LoadedData
from mtkd.data.split import Split
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError

Loader = Callable[..., LoadedData]

ROWS = {
    "premise": ["The cat sat on the mat", "It rained all day long in the town by the sea", "No"],
    "hypothesis": ["a cat sat", "the sun shone on the town", "yes it is so and not otherwise, they say"],
    "label": ["yes", "no", "no"],
}
TEMPLATE = "{premise}? [MASK], {hypothesis}."
WORDS = {"yes": " Yes", "no": " No way"}


@pytest.fixture(scope="module")
def glm() -> PreTrainedTokenizerFast:
    # words behind a space, so that the space is part of their first token
    return trained_tokenizer([*ROWS["premise"], *(f" {text}" for text in ROWS["hypothesis"]), "Yes No way"] * 5, 400)


@pytest.fixture
def cloze(load: Loader, glm: PreTrainedTokenizerFast) -> Callable[..., LoadedData]:
    def made(rows: dict[str, list] = ROWS, **fields: object) -> LoadedData:
        whole = {"task": "glm-cloze", "cloze": TEMPLATE, "verbalizers": WORDS, "max_length": 64, **fields}
        return load(rows, glm, **whole)

    return made


def texts(split: Split, glm: PreTrainedTokenizerFast) -> list[str]:
    batch = split.collate(range(len(split)))
    return [glm.decode(ids[mask]) for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)]


def test_the_template_is_filled_in(cloze: Callable[..., LoadedData], glm: PreTrainedTokenizerFast) -> None:
    data = cloze()
    split = data.splits["train"]
    pairs = zip(ROWS["premise"], ROWS["hypothesis"], strict=True)
    whole = [f"{premise}? [MASK], {hypothesis}." for premise, hypothesis in pairs]
    batch = split.collate(range(3))
    for row, text in enumerate(whole):
        assert batch.input_ids[row][batch.attention_mask[row]].tolist() == glm(text)["input_ids"]
    assert (data.label_names, data.num_labels, batch.targets.tolist()) == (("no", "yes"), 2, [1, 0, 0])
    assert cloze(labels=["yes", "no"]).splits["train"].collate([0, 1]).targets.tolist() == [0, 1]
    assert batch.sep is None


@pytest.mark.parametrize("most", range(8, 22))
def test_the_longest_column_is_cut_and_the_blank_never(
    cloze: Callable[..., LoadedData], glm: PreTrainedTokenizerFast, most: int
) -> None:
    """Against columns that are shortened token by token before they are put into the template."""
    split = cloze(max_length=most).splits["train"]
    ids = [glm(ROWS[name], add_special_tokens=False)["input_ids"] for name in ("premise", "hypothesis")]
    fixed = len(["[CLS]", "?", "[MASK]", ",", ".", "<|endoftext|>"])
    for row, text in enumerate(texts(split, glm)):
        first, second = (list(column[row]) for column in ids)
        if second and not ROWS["hypothesis"][row].startswith(" "):
            spaced = f" {ROWS['hypothesis'][row]}"  # its first token has the template's space
            second = glm(spaced, add_special_tokens=False)["input_ids"]
        while fixed + len(first) + len(second) > most:
            (second if len(second) > len(first) else first).pop()
        wanted = f"[CLS]{glm.decode(first)}?[MASK],{glm.decode(second)}.<|endoftext|>"
        assert text.replace("? [MASK]", "?[MASK]") == wanted
        assert text.count("[MASK]") == 1
        assert split.lengths[row] <= most
    assert "the blank never" in split.note


def test_words_of_the_classes(glm: PreTrainedTokenizerFast) -> None:
    def ids(**words: str) -> list[list[int]]:
        config = DataConfig(source="files", task="glm-cloze", cloze=TEMPLATE, verbalizers=words)
        return answer_ids(config, glm, "data.x")

    assert ids(yes=" Yes", no=" No way") == [
        glm(text, add_special_tokens=False)["input_ids"] for text in (" No way", " Yes")
    ]
    assert len(ids(yes=" Yes", no=" No way")[0]) > 1


def test_what_is_refused(cloze: Callable[..., LoadedData], load: Loader, glm: PreTrainedTokenizerFast) -> None:
    for fields, message in (
        ({"cloze": None}, "needs cloze and verbalizers"),
        ({"verbalizers": {"yes": " Yes"}}, "needs cloze and verbalizers"),
        ({"verbalizers": {"yes": " Yes", "no": " Yes"}}, "words of its own"),
        ({"verbalizers": {"yes": " Yes", "no": " "}}, "words of its own"),
        ({"labels": ["yes", "maybe"]}, "different classes"),
        ({"text": "premise"}, "those of its template"),
        ({"max_length": 5}, "the template alone is too long"),
        ({"mask_share": 0.2}, "does not read this"),
    ):
        with pytest.raises(UserError, match=message):
            cloze(**fields)
    for template, message in (
        ("{premise} and {hypothesis}", "with one \\[MASK\\]"),
        ("{premise} [MASK] [MASK]", "with one \\[MASK\\]"),
        ("[MASK]", "names no column|with one"),
        ("{premise} [MASK]\\n", "backslash"),
        ("{} [MASK]", "bare name"),
    ):
        with pytest.raises(ValueError, match=message):
            DataConfig(source="files", task="glm-cloze", cloze=template, verbalizers=WORDS)
    with pytest.raises(DataError, match="holds the blank itself"):
        cloze({**ROWS, "premise": ["a [MASK] b", "c", "d"]})
    with pytest.raises(DataError, match="unknown label"):
        cloze({**ROWS, "label": ["yes", "no", "perhaps"]})
    with pytest.raises(UserError, match="knows \\[MASK\\]"):
        load(ROWS, train_tokenizer(["a b"], 300), task="glm-cloze", cloze=TEMPLATE, verbalizers=WORDS)
