"""Two tokenizers are the same when they give the same ids for every text; who ends and who pads is the run's choice."""

from __future__ import annotations

import json
from typing import Any

import pytest
from data_examples import sentences
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mtkd.data.segmentation import PROBES, check_certain, segmentation_digest
from mtkd.data.tokenizers import check_same_tokenizer, token_ids, tokenizer_fingerprint, train_tokenizer
from mtkd.errors import DataError

WHERE = "stages.s.teachers[0]"
CHATTY = ("<|im_start|>", "<|im_end|>")


def spec_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def from_spec(spec: dict[str, Any], **parts: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **parts)


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    """A byte-level BPE with the tokens of a chat, as tokenizer.json has it."""
    made = train_tokenizer(sentences(200), 400)
    made.add_special_tokens({"additional_special_tokens": list(CHATTY)})
    return spec_of(made)


def unigram(scores: float = -1.0) -> PreTrainedTokenizerFast:
    """Pieces and their scores; the better of "ab" + "c" and "a" + "bc" depends on them."""
    pieces = [("<unk>", 0.0), ("a", -3.0), ("b", -3.0), ("c", -3.0), ("ab", scores), ("bc", -2.0), ("▁", -1.5)]
    core = Tokenizer(models.Unigram(pieces, unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


def wordpiece(longest: int = 100, **parts: bool) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "the", "a", "##n", "teacher", "##s", "student", "##e", "é", "e"]
    ids = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=longest))
    core.normalizer = normalizers.BertNormalizer(**parts)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")


def refused(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast) -> str:
    with pytest.raises(DataError) as caught:
        check_same_tokenizer(student, teacher, WHERE)
    assert caught.value.where == WHERE
    return str(caught.value)


@pytest.mark.parametrize(
    ("student", "teacher", "parts"),
    [
        ({"eos_token": "</s>"}, {"eos_token": "<|im_end|>"}, ["eos_token"]),
        ({}, {"pad_token": "<pad>"}, ["pad_token"]),
        ({"pad_token": "<pad>"}, {}, ["pad_token"]),
        ({"pad_token": "<pad>", "eos_token": "</s>"}, {"pad_token": "</s>", "eos_token": "</s>"}, ["pad_token"]),
        ({"bos_token": "<s>", "eos_token": "</s>"}, {"cls_token": "<s>"}, ["bos_token", "eos_token", "cls_token"]),
        ({"eos_token": "</s>"}, {"eos_token": "</s>"}, []),
    ],
)
def test_other_ends_and_paddings_are_notes(
    spec: dict[str, Any], student: dict[str, str], teacher: dict[str, str], parts: list[str]
) -> None:
    """The pairs of a base model and its instruct version: every id means the same in both."""
    notes = check_same_tokenizer(from_spec(spec, **student), from_spec(spec, **teacher), WHERE)
    assert len(notes) == len(parts)
    assert all(any(f"its {part} " in note for note in notes) for part in parts)


def test_settings_that_change_no_text_are_no_difference(spec: dict[str, Any]) -> None:
    """Truncation, padding, offsets, what stands around a text, and two ways to write one rule."""
    other = json.loads(json.dumps(spec))
    other["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    other["padding"] = {
        "strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0,
        "pad_token": "<pad>",
    }  # fmt: skip
    other["post_processor"] = None
    other["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{**spec["pre_tokenizer"], "trim_offsets": False}]}
    other["model"] |= {"dropout": 0.0, "unk_token": "<unk>", "continuing_subword_prefix": ""}  # every byte is known
    other["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    notes = check_same_tokenizer(from_spec(spec), from_spec(other), WHERE)
    assert all("pad_token" in note for note in notes)  # the padding names a token
    assert segmentation_digest(from_spec(spec)) == segmentation_digest(from_spec(other))


def test_special_tokens_behind_the_runs_ids_are_a_note_and_other_new_tokens_are_refused(spec: dict[str, Any]) -> None:
    """A teacher to which somebody added a padding token: the run writes none of its texts with it."""
    teacher = from_spec(spec)
    teacher.add_special_tokens({"pad_token": "[PAD]"})
    notes = check_same_tokenizer(from_spec(spec), teacher, WHERE)
    assert any("[PAD]" in note for note in notes)
    assert "'[PAD]'" in refused(teacher, from_spec(spec))  # the other way round the run may write it
    plain = from_spec(spec)
    plain.add_tokens(["teacher shows"])
    assert "'teacher shows' is missing here" in refused(from_spec(spec), plain)
    eager = from_spec(spec)
    eager.add_special_tokens({"additional_special_tokens": ["the"]})  # special by its flag alone
    if "the" not in token_ids(from_spec(spec)):
        assert "ids here and" in refused(from_spec(spec), eager)


def test_another_mask_is_refused_where_masks_are_asked_about(spec: dict[str, Any]) -> None:
    student, teacher = from_spec(spec, mask_token="<mask>"), from_spec(spec, mask_token="<unk>")
    assert len(check_same_tokenizer(student, teacher, WHERE)) == 1
    with pytest.raises(DataError, match="different masks"):
        check_same_tokenizer(student, teacher, WHERE, masked=True)
    assert check_same_tokenizer(student, from_spec(spec), WHERE, masked=True)  # it does not say which


def edited(spec: dict[str, Any], edit: str) -> PreTrainedTokenizerFast:
    other = json.loads(json.dumps(spec))
    match edit:
        case "merges":
            other["model"]["merges"].reverse()
        case "lost merge":
            other["model"]["merges"].pop(3)
        case "dropout":
            other["model"]["dropout"] = 0.1
        case "byte_fallback":
            other["model"]["byte_fallback"] = True
        case "ignore_merges":
            other["model"]["ignore_merges"] = True
        case "end_of_word_suffix":
            other["model"]["end_of_word_suffix"] = "d"
        case "Lowercase" | "NFKC":
            other["normalizer"] = {"type": edit}
        case "add_prefix_space":
            other["pre_tokenizer"]["add_prefix_space"] = True
        case "Digits":
            digits = {"type": "Digits", "individual_digits": True}
            other["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, other["pre_tokenizer"]]}
        case "lstrip" | "single_word":
            other["added_tokens"][-1][edit] = True
    return from_spec(other)


@pytest.mark.parametrize(
    "edit",
    ["merges", "lost merge", "dropout", "byte_fallback", "ignore_merges", "end_of_word_suffix", "Lowercase", "NFKC",
     "add_prefix_space", "Digits", "lstrip", "single_word"],
)  # fmt: skip
def test_another_rule_with_the_same_ids_is_refused_by_name(spec: dict[str, Any], edit: str) -> None:
    """R3: every token has the same id, and a sentence has other ids."""
    student, teacher = from_spec(spec), edited(spec, edit)
    assert token_ids(student) == token_ids(teacher)
    assert edit.removeprefix("lost ").removesuffix("s") in refused(student, teacher)
    assert segmentation_digest(student) != segmentation_digest(teacher)


def test_scores_of_a_unigram_and_limits_of_wordpiece_are_rules() -> None:
    assert check_same_tokenizer(unigram(), unigram(), WHERE) == []
    assert unigram().tokenize("abc") != unigram(-9.0).tokenize("abc")
    assert "score" in refused(unigram(), unigram(-9.0))
    assert check_same_tokenizer(wordpiece(), wordpiece(), WHERE) == []
    assert "max_input_chars_per_word" in refused(wordpiece(), wordpiece(7))
    assert "strip_accents" in refused(wordpiece(), wordpiece(strip_accents=False))
    assert "lowercase" in refused(wordpiece(), wordpiece(lowercase=False))


def test_a_tokenizer_that_does_not_tell_its_rules_is_compared_by_what_it_does(spec: dict[str, Any]) -> None:
    """A class in Python has no tokenizer.json: the probes see another cut."""

    class Mute(PreTrainedTokenizerFast):
        backend_tokenizer = None  # type: ignore[assignment]

        def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:  # type: ignore[override]
            core = self._tokenizer
            return {"input_ids": [core.encode(text, add_special_tokens=False).ids for text in texts]}

    def mute(of: PreTrainedTokenizerFast) -> Mute:
        return Mute(tokenizer_object=Tokenizer.from_str(json.dumps(spec_of(of))))

    student = from_spec(spec)
    assert check_same_tokenizer(student, mute(student), WHERE) == []
    for edit in ("merges", "Lowercase", "add_prefix_space", "NFKC"):
        message = refused(student, mute(edited(spec, edit)))
        assert "ids here and" in message, edit
        assert segmentation_digest(mute(student)) != segmentation_digest(mute(edited(spec, edit)))


def test_a_tokenizer_that_draws_is_no_tokenizer_of_a_run(spec: dict[str, Any]) -> None:
    check_certain(from_spec(spec), "tokenizer")
    with pytest.raises(DataError, match="differently each time"):
        check_certain(edited(spec, "dropout"), "tokenizer")


def test_probes_cover_what_rules_do_to_text() -> None:
    """Each of these changes at least one probe: a rule that none of them shows would be compared by form alone."""
    for change in (str.lower, str.upper, str.strip, str.casefold):
        assert any(change(text) != text for text in PROBES)
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        normaliser = getattr(normalizers, form)()
        assert any(normaliser.normalize_str(text) != text for text in PROBES)
    assert any("\n" in text for text in PROBES)
    assert any(ord(c) > 0xFFFF for text in PROBES for c in text)


def test_the_old_fingerprint_stays_as_finished_stages_know_it() -> None:
    """Of this very tokenizer, by the code of 28 November: token -> id, parts, normaliser, pre-tokenizer, no more."""
    made = unigram()
    parts = [{t: i for i, t in enumerate(("<unk>", "a", "b", "c", "ab", "bc", "▁"))}, {"unk_token": 0}]
    rules = {"normalizer": {}, "pre_tokenizer": spec_of(made)["pre_tokenizer"]}
    import hashlib

    expected = hashlib.sha256(json.dumps([*parts, rules], sort_keys=True, ensure_ascii=True).encode()).hexdigest()
    assert tokenizer_fingerprint(made) == expected == tokenizer_fingerprint(unigram(-9.0))
    assert segmentation_digest(made) != segmentation_digest(unigram(-9.0))
