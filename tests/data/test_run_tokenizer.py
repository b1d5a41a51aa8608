"""The trained tokenizer is deterministic and lossless; a vocabulary that differs anywhere is refused by name."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path

import pytest
from data_examples import sentences
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mtkd.data.tokenizers import (
    check_same_tokenizer,
    load_tokenizer,
    num_real_ids,
    special_ids,
    token_ids,
    tokenizer_fingerprint,
    train_tokenizer,
)
from mtkd.errors import DataError, UserError


def changed(tokenizer: PreTrainedTokenizerFast, edit: str) -> PreTrainedTokenizerFast:
    """The same tokenizer with one thing changed in its serialised form."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {p: getattr(tokenizer, p) for p in ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token")}
    vocabulary = spec["model"]["vocab"]
    last, before = sorted(vocabulary, key=vocabulary.__getitem__)[-2:]
    if edit == "permuted":
        vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]
    elif edit == "normalizer":
        spec["normalizer"] = {"type": "Lowercase"}
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **special)
    made.cls_token, made.sep_token = "<s>", "</s>"
    if edit == "added":
        made.add_tokens(["<extra>"])
    return made


def test_same_texts_give_the_same_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    again = train_tokenizer(iter(sentences(200)), 400, closed=True)
    other = train_tokenizer(sentences(200, seed=1), 400, closed=True)
    assert token_ids(again) == token_ids(tokenizer)
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(other) != tokenizer_fingerprint(tokenizer)


def test_it_has_the_size_asked_for_and_all_special_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    assert num_real_ids(train_tokenizer(sentences(200), 300)) == 300
    assert sorted(token_ids(tokenizer).values()) == list(range(num_real_ids(tokenizer)))
    parts = {"pad_token": 0, "bos_token": 1, "cls_token": 1, "eos_token": 2, "sep_token": 2, "unk_token": 3}
    assert special_ids(tokenizer) == {**parts, "mask_token": 4}


def test_any_text_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Unseen: ЖЖ \t tabs,\n\n newlines é 🙂 'don't' ."
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_only_a_closed_one_ends_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    open_one = train_tokenizer(sentences(200), 400)
    assert tokenizer("the")["input_ids"][-1] == tokenizer.eos_token_id
    assert open_one("the")["input_ids"] == tokenizer("the")["input_ids"][:-1]
    assert open_one("the")["input_ids"][0] == open_one.bos_token_id


def test_a_chat_template_counts_where_it_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    one, other = copy.deepcopy(tokenizer), copy.deepcopy(tokenizer)
    one.chat_template, other.chat_template = "{{ messages }}", "Answer wrongly. {{ messages }}"
    assert tokenizer_fingerprint(one) == tokenizer_fingerprint(other) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(one, chat=True) != tokenizer_fingerprint(other, chat=True)


def test_it_is_the_same_after_saving_and_loading(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    check_same_tokenizer(tokenizer, loaded, "teacher")
    for text in sentences(5, seed=3):
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        ("permuted", "2 tokens differ"),
        ("added", "'<extra>' is missing here and 400 there"),
        ("normalizer", "Lowercase"),
    ],
)
def test_a_different_tokenizer_is_refused(tokenizer: PreTrainedTokenizerFast, edit: str, expected: str) -> None:
    check_same_tokenizer(tokenizer, changed(tokenizer, "nothing"), "stages.s.teachers[0]")
    teacher = changed(train_tokenizer(sentences(200), 400) if edit == "added" else tokenizer, edit)
    student = tokenizer
    if edit == "permuted":
        assert len(teacher) == len(student)
    if num_real_ids(student) != 400:
        expected = expected.replace("400", str(num_real_ids(student)))
    with pytest.raises(DataError) as caught:
        check_same_tokenizer(student, teacher, "stages.s.teachers[0]")
    assert expected in str(caught.value)
    assert str(caught.value).startswith("stages.s.teachers[0]")
    assert tokenizer_fingerprint(student) != tokenizer_fingerprint(teacher)


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="too few ids"):
        train_tokenizer(["text"], 100)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", " "], 400)
    with pytest.raises(DataError, match="cannot be loaded"):
        load_tokenizer(str(tmp_path))


def test_remote_code_is_not_run(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder, trace = tmp_path / "evil", tmp_path / "ran"
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(trace)!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(DataError):  # falling back to the plain class is fine too
        load_tokenizer(str(folder))
    assert not trace.exists()
