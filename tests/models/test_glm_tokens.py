"""GLM's tokenizers: commands at their published ids, text split as GPT-2 and BERT split it; prompts with a blank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from glm_bank import logits_of, noisy, prefix, small_config
from glm_files import MERGES, bert_file, gpt2_files, originals, write
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer

from mtkd.config import ModelConfig
from mtkd.data.tokenizers import num_real_ids, tokenizer_fingerprint
from mtkd.errors import DataError, UserError
from mtkd.models.fresh import fresh_config
from mtkd.models.glm import (
    GLMForConditionalGeneration,
    bert_tokenizer,
    blank_prompts,
    convert_checkpoint,
    gpt2_tokenizer,
    pieces,
)
from mtkd.models.info import CAUSAL_LM
from mtkd.models.request import ModelRequest


def test_published_ids_of_the_gpt2_vocabulary(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(*gpt2_files(tmp_path, 50257))
    published = {
        "<|endoftext|>": 50256, "<|startofpiece|>": 50257, "<|endofpiece|>": 50258, "[CLS]": 50259, "[MASK]": 50260,
        "[SEP]": 50261, "[UNK]": 50262, "[gMASK]": 50263, "[sMASK]": 50264, "[dBLOCK]": 50265,
    }  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (50256, 50256, 50260)
    assert num_real_ids(tokenizer) == 50266


def test_published_ids_of_the_bert_vocabulary(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(bert_file(tmp_path, 30522))
    published = {
        "[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103,
        "<|startofpiece|>": 30522, "<|endofpiece|>": 30523, "[gMASK]": 30524, "[sMASK]": 30525, "[dBLOCK]": 30526,
    }  # fmt: skip
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in published} == published
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 103)


TEXTS = ["the cats on the mat.", "  The cat\n\tsat on Äpfel ☃", "", "a" * 20, "on.on , the!"]


def test_text_is_split_as_the_plain_tokenizers_split_it(tmp_path: Path) -> None:
    vocabulary, merges = gpt2_files(tmp_path / "gpt2")
    ours = gpt2_tokenizer(vocabulary, merges)
    ids = json.loads(vocabulary.read_text())
    plain = GPT2Tokenizer(vocab=ids, merges=list(MERGES))
    file = bert_file(tmp_path / "bert")
    words = {token: number for number, token in enumerate(file.read_text().split("\n")[:-1])}
    bert, plain_bert = bert_tokenizer(file), BertTokenizer(vocab=words, do_lower_case=True)
    for text in TEXTS:
        found = ours(text)["input_ids"]
        assert found[1:-1] == plain(text, add_special_tokens=False)["input_ids"]
        assert ours.convert_ids_to_tokens([found[0], found[-1]]) == ["[CLS]", "<|endoftext|>"]
        assert ours.decode(found, skip_special_tokens=True) == text
        assert bert(text)["input_ids"] == plain_bert(text)["input_ids"]
        assert bert(text, "on")["input_ids"] == plain_bert(text, "on")["input_ids"]
    assert "Ġcat" in ours.tokenize("the cat")


def test_blanks_are_one_token_and_take_their_space_along(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(*gpt2_files(tmp_path))
    for blank in ("[MASK]", "[gMASK]", "[sMASK]"):
        found = tokenizer(f"the {blank} cat", add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(found) == ["the", blank, "Ġcat"]
    bert = bert_tokenizer(bert_file(tmp_path))
    found = bert("The [MASK] SAT [gMASK]", add_special_tokens=False)["input_ids"]
    assert bert.convert_ids_to_tokens(found) == ["the", "[MASK]", "sat", "[gMASK]"]


def test_saved_and_loaded(tmp_path: Path) -> None:
    for name, made in (
        ("gpt2", gpt2_tokenizer(*gpt2_files(tmp_path / "a"))),
        ("bert", bert_tokenizer(bert_file(tmp_path / "b"))),
    ):
        made.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(made)
        text = "the [MASK] on [sMASK]"
        assert loaded(text)["input_ids"] == made(text)["input_ids"]
        assert "token_type_ids" not in loaded(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no end", "missing: \\['<|endoftext|>'\\]"),
        ("command", "already: \\['\\[gMASK\\]'\\]"),
        ("hole", "ids up to"),
        ("json", "BPE vocabulary"),
        ("merges", "BPE vocabulary"),
        ("foreign merges", "BPE vocabulary"),
    ],
)
def test_gpt2_files_that_are_refused(change: str, message: str, tmp_path: Path) -> None:
    vocabulary, merges = gpt2_files(tmp_path)
    ids = json.loads(vocabulary.read_text())
    if change == "no end":
        del ids["<|endoftext|>"]
    elif change == "command":
        ids["[gMASK]"] = len(ids)
    elif change == "hole":
        ids["more"] = 5000
    vocabulary.write_text("{" if change == "json" else json.dumps(ids))
    if "merges" in change:
        merges.write_text("a b c\n" if change == "merges" else "q qq\n")
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        gpt2_tokenizer(vocabulary, merges)


def test_bert_files_that_are_refused(tmp_path: Path) -> None:
    file = bert_file(tmp_path)
    for text, message in (
        (file.read_text().replace("[MASK]\n", ""), r"missing: \['\[MASK"),
        (file.read_text() + "cat\n", "1 tokens twice"),
        (file.read_text() + "[sMASK]\n", "already"),
    ):
        (tmp_path / "other.txt").write_text(text)
        with pytest.raises(DataError, match=message):
            bert_tokenizer(tmp_path / "other.txt")
    with pytest.raises(DataError, match="cannot be read"):
        bert_tokenizer(tmp_path / "none.txt")


def test_prompts_by_hand(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(bert_file(tmp_path))
    pad, cls, sep, mask, gmask, sop = (
        tokenizer.convert_tokens_to_ids(t) for t in ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[gMASK]", "<|startofpiece|>")
    )
    the, cat, sat = (tokenizer.convert_tokens_to_ids(w) for w in ("the", "cat", "sat"))
    found = blank_prompts(tokenizer, ["the [MASK] sat [MASK]", "cat [gMASK]"])
    assert found["input_ids"].tolist() == [
        [cls, the, mask, sat, mask, sep, sop],
        [pad, pad, cls, cat, gmask, sep, sop],
    ]
    assert found["position_ids"].tolist() == [
        [[0, 1, 2, 3, 4, 5, 2], [0, 0, 0, 0, 0, 0, 1]],
        [[0, 0, 0, 1, 2, 3, 2], [0, 0, 0, 0, 0, 0, 1]],
    ]
    assert found["attention_mask"].tolist() == [[1] * 7, [0, 0, 1, 1, 1, 1, 1]]
    assert found["sep"].tolist() == [6, 4]


def test_a_blank_is_filled_as_by_the_written_out_architecture(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(bert_file(tmp_path))
    size, end = len(tokenizer), tokenizer.convert_tokens_to_ids("<|endofpiece|>")
    config = small_config(vocab_size=size, pad_token_id=0, eos_token_id=end, mask_token_id=None, sop_token_id=None)
    model = noisy(GLMForConditionalGeneration(config).double())
    texts = ["the [MASK] sat", "a cat on the mat [gMASK]"]
    inputs = blank_prompts(tokenizer, texts)
    found = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    for row, text in enumerate(texts):
        part_a = tokenizer(text)["input_ids"]
        at = next(i for i, token in enumerate(tokenizer.convert_ids_to_tokens(part_a)) if "MASK" in token)
        ids, steps = [*part_a, tokenizer.convert_tokens_to_ids("<|startofpiece|>")], []
        while len(steps) < 5 and (not steps or steps[-1] != end):
            positions = [(i, 0) if i < len(part_a) else (at, i - len(part_a) + 1) for i in range(len(ids))]
            steps.append(int(logits_of(model, ids, positions, prefix(len(ids), len(part_a)))[-1].argmax()))
            ids.append(steps[-1])
        assert found[row, inputs["input_ids"].shape[1] :][: len(steps)].tolist() == steps


def test_pieces_end_at_their_end(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(*gpt2_files(tmp_path))
    end, pad = tokenizer.convert_tokens_to_ids("<|endofpiece|>"), tokenizer.pad_token_id
    words = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    rows = [[7, 7, *words, end, pad], [7, 7, *words, *words]]
    width = max(map(len, rows))
    generated = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    assert pieces(tokenizer, generated, 2) == ["the cat", "the catthe cat"]


def test_texts_and_tokenizers_that_are_refused(tmp_path: Path) -> None:
    tokenizer = bert_tokenizer(bert_file(tmp_path))
    with pytest.raises(UserError, match="no text"):
        blank_prompts(tokenizer, [])
    with pytest.raises(UserError, match="no blank") as error:
        blank_prompts(tokenizer, ["a [MASK]", "the cat"])
    assert "text 1" in str(error.value)
    plain = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    with pytest.raises(DataError, match="startofpiece"):
        blank_prompts(plain, ["a [MASK]"])


def test_a_tokenizer_goes_along_with_converted_weights(tmp_path: Path) -> None:
    _, weights = originals()
    source = write(tmp_path / "source", "hub", weights)
    with pytest.raises(UserError, match="not that of the weights"):  # 70 columns
        convert_checkpoint(source, tmp_path / "never", heads=4, vocabulary=bert_file(tmp_path / "bert").parent)
    with pytest.raises(UserError, match="no vocabulary"):
        convert_checkpoint(source, tmp_path / "never", heads=4, vocabulary=tmp_path)
    assert not (tmp_path / "never").exists()
    weights["word_embeddings.weight"] = torch.zeros(128, 24)
    wide = write(tmp_path / "wide", "hub", weights)
    bert_file(wide)
    convert_checkpoint(wide, tmp_path / "out", heads=4)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(bert_tokenizer(wide / "vocab.txt"))


def test_fresh_models_know_the_commands(tmp_path: Path) -> None:
    tokenizer = gpt2_tokenizer(*gpt2_files(tmp_path))
    described = ModelConfig.model_validate({"architecture": "glm_blocklm", "layers": 1, "width": 8, "heads": 2})
    config = fresh_config(described, ModelRequest(CAUSAL_LM, len(tokenizer), 16, tokenizer))
    ids = tokenizer.get_vocab()
    assert (config.sop_token_id, config.mask_token_id) == (ids["<|startofpiece|>"], ids["[MASK]"])
    assert config.eos_token_id == ids["<|endofpiece|>"]  # where generation of a piece ends
