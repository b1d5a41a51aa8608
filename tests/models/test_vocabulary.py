"""Compressed vocabularies: which ids stay, what stands for the others, and that an exported tokenizer says the same."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from model_bank import EVERY_HEAD, batch, build, description, lively
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mtkd.config import DataConfig, ModelConfig, VocabularyConfig, teacher_config
from mtkd.data.raw import Raw
from mtkd.data.tokenizers import num_real_ids, tokenizer_fingerprint, train_tokenizer
from mtkd.data.vocabulary import compress_tokenizer, count_ids, shareable_ids
from mtkd.errors import DataError, UserError
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM
from mtkd.models.load import compress_model
from mtkd.models.taps import TappedModel
from mtkd.models.vocabulary import VocabularyMap, choose_kept, make_map, make_vocabulary, read_vocabulary

WORDS = ("ab", "abc", "cab", "bad", "dab", "add", "dad", "abba", "cad", "baba", "back", "a", "dada", "bc")
TEXTS = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(40)]
HARD = ["", "Abba, dad!", "xyz zab", "dab-dab (add)  back", "é ab 12", "[MASK] ab", "ab</s>cab"]


def wordpiece() -> BertTokenizer:
    pieces = [*"abcdk", "ab", "abc", "da", "dad", "ba", "back", "add", ",", "!", "-", "(", ")"]
    tails = [*(f"##{letter}" for letter in "abcdk"), "##ab", "##ad", "##ba", "##c!", "##d."]
    return BertTokenizer(
        vocab={t: i for i, t in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *pieces, *tails])}
    )


def bpe(closed: bool = True) -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS, 300, closed=closed)


TOKENIZERS = {"wordpiece": wordpiece, "bpe": bpe}


def vocabulary(tokenizer: PreTrainedTokenizerBase, keep: float, seed: int = 0) -> VocabularyMap:
    """By the counts of TEXTS and a random embedding."""
    num_ids = num_real_ids(tokenizer)
    counts = count_ids(tokenizer, TEXTS, num_ids)
    config = build(description("bert"), MASKED_LM).config
    config.pad_token_id = tokenizer.pad_token_id
    kept = choose_kept(VocabularyConfig(keep=keep), counts, tokenizer, config, (), "here")
    table = torch.randn(num_ids, 8, generator=torch.Generator().manual_seed(seed))
    return make_map(kept, counts, table, shareable_ids(tokenizer, "here"), tokenizer_fingerprint(tokenizer))


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    return TOKENIZERS[request.param]()


def test_an_exported_tokenizer_says_the_compressed_ids(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The same segmentation, each id mapped; special ids, pairs and decoding too; read five times, as the order of the
    library's hash tables is a matter of chance."""
    found = vocabulary(tokenizer, 0.85)
    num_ids = num_real_ids(tokenizer)
    assert found.num_kept == round(0.85 * num_ids)
    tokenizer.save_pretrained(tmp_path)
    compress_tokenizer(tmp_path, found.kept.tolist(), found.to_kept.tolist())
    removed = found.is_removed(torch.arange(num_ids))
    assert int(removed.sum()) == num_ids - found.num_kept
    texts = [*TEXTS, *HARD, *(tokenizer.decode([i]) for i in removed.nonzero().squeeze(-1).tolist())]
    for _ in range(5):
        small = AutoTokenizer.from_pretrained(tmp_path)
        for text in texts:
            ids = tokenizer(text)["input_ids"]
            assert small(text)["input_ids"] == found.to_kept[ids].tolist()
            assert small(text, "ab")["input_ids"] == found.to_kept[tokenizer(text, "ab")["input_ids"]].tolist()
            kept = found.kept[found.to_kept[ids]]
            for skip in (True, False):
                wanted = tokenizer.decode(kept, skip_special_tokens=skip)
                assert small.decode(found.to_kept[ids], skip_special_tokens=skip) == wanted
    used = {int(i) for text in texts for i in tokenizer(text)["input_ids"]}
    assert used & set(removed.nonzero().squeeze(-1).tolist()), "no removed token was in the texts"
    for part in ("pad", "unk", "mask", "cls", "sep"):
        old = getattr(tokenizer, f"{part}_token_id")
        assert getattr(small, f"{part}_token_id") == int(found.to_kept[old])
        assert small.decode([int(found.to_kept[old])]) == tokenizer.decode([old])
    pair, wanted = small("ab", "cab"), tokenizer("ab", "cab")
    assert pair.keys() == wanted.keys()
    assert pair.get("token_type_ids") == wanted.get("token_type_ids")
    padded = small(["ab", "ab cab dad"], padding=True)
    assert padded["attention_mask"][0][-1] == 0
    assert padded["input_ids"][0][-1] == int(found.to_kept[tokenizer.pad_token_id])


def test_merges_keep_the_ids_that_they_are_built_from() -> None:
    """Byte-level BPE merges ids: tokens that a merge starts from are never removed."""
    tokenizer = bpe()
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    parts = {content["vocab"][part] for merge in content["merges"] for part in merge}
    assert len(parts) > 5
    assert not parts & set(shareable_ids(tokenizer, "here").tolist())
    assert not set(tokenizer.all_special_ids) & set(shareable_ids(tokenizer, "here").tolist())


def test_kinds_that_cannot_say_it_are_refused() -> None:
    core = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="kind Unigram cannot be compressed") as error:
        shareable_ids(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>"), "stages.s.student")
    assert "WordPiece, BPE" in str(error.value)


def test_the_most_frequent_stay_and_ties_go_to_the_smaller_id(tokenizer: PreTrainedTokenizerBase) -> None:
    num_ids = num_real_ids(tokenizer)
    share = shareable_ids(tokenizer, "here")
    counts = np.zeros(num_ids, np.int64)
    counts[share[-3]], counts[share[-1]] = 7, 2
    config = build(description("bert"), MASKED_LM).config
    fixed = num_ids - len(share)
    kept = choose_kept(VocabularyConfig(keep=(fixed + 4) / num_ids), counts, tokenizer, config, (), "here")
    wanted = sorted({*range(num_ids)} - {*share.tolist()} | {share[-3], share[-1], share[0], share[1]})
    assert kept.tolist() == wanted
    with pytest.raises(UserError, match="more ids must be kept") as error:
        choose_kept(VocabularyConfig(keep=fixed / num_ids), counts, tokenizer, config, (), "here")
    assert f"{fixed / num_ids:.3f}" in str(error.value)


def test_verbaliser_tokens_stay() -> None:
    tokenizer = wordpiece()
    config, counts = build(description("bert"), MASKED_LM).config, np.zeros(num_real_ids(tokenizer), np.int64)
    words = VocabularyConfig(keep=0.4, always=("back",))
    kept = choose_kept(words, counts, tokenizer, config, ("dad", "kab"), "here").tolist()
    for word in ("back", "dad", "kab"):
        assert set(tokenizer(word, add_special_tokens=False)["input_ids"]) <= set(kept)
    less = choose_kept(VocabularyConfig(keep=0.4), counts, tokenizer, config, (), "here").tolist()
    assert tokenizer.convert_tokens_to_ids("back") not in less


def test_a_removed_id_goes_to_the_largest_inner_product() -> None:
    tokenizer = wordpiece()
    num_ids = num_real_ids(tokenizer)
    table = torch.randn(num_ids, 8, generator=torch.Generator().manual_seed(0))
    table[0] = 100.0 * table[20]  # the pad token must not attract anything
    found = vocabulary(tokenizer, 0.6)
    kept, share = found.kept.numpy(), set(shareable_ids(tokenizer, "here").tolist())
    found = make_map(kept, found.counts.numpy(), table, np.array(sorted(share)), "x")
    for number in range(num_ids):
        if number in kept:
            assert found.kept[found.to_kept[number]] == number
        else:
            scores = {k: float(table[number].double() @ table[k].double()) for k in kept.tolist() if k in share}
            assert int(found.kept[found.to_kept[number]]) == max(scores, key=lambda k: scores[k])
    same = make_map(kept, found.counts.numpy(), torch.ones(num_ids, 2), np.array(sorted(share)), "x")
    first = min(k for k in kept.tolist() if k in share)
    assert set(same.kept[same.to_kept[same.is_removed(torch.arange(num_ids))]].tolist()) <= {first}


def test_shares_of_a_class_sum_to_one() -> None:
    found = vocabulary(wordpiece(), 0.6)
    shares = found.log_share(torch.arange(len(found.to_kept))).exp()
    sums = torch.zeros(found.num_kept).index_add_(0, found.to_kept, shares)
    torch.testing.assert_close(sums, torch.ones(found.num_kept))


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
@pytest.mark.parametrize("tie", [True, False])
def test_the_rows_of_kept_ids_give_the_same_logits(architecture: str, auto_class: str, tie: bool) -> None:
    """A compressed model equals the whole one on kept ids, in their columns; removed ids are read as kept ones."""
    tokenizer = wordpiece()
    num_ids = num_real_ids(tokenizer)
    whole = lively(build(description(architecture, tie_embeddings=tie), auto_class, num_ids=num_ids))
    whole.config.pad_token_id = 1 if architecture == "roberta" else 0
    found = vocabulary(tokenizer, 0.6)
    small = compress_model(whole, auto_class, found, seed=5)
    inputs = batch()
    inputs.input_ids = inputs.input_ids % num_ids
    wants = frozenset({"logits", "hidden.3"})
    ours = TappedModel(small, auto_class, num_ids, found).eval()(inputs, wants)
    inputs.input_ids = found.kept[found.to_kept[inputs.input_ids]]
    theirs = TappedModel(whole, auto_class, num_ids).eval()(inputs, wants)
    torch.testing.assert_close(ours["hidden.3"], theirs["hidden.3"])
    index = torch.arange(3 if auto_class == CLASSIFIER else inputs.input_ids.numel())
    wanted = theirs["logits"].rows(index)  # type: ignore[union-attr]
    if auto_class != CLASSIFIER:
        wanted = wanted[:, found.kept]
    torch.testing.assert_close(ours["logits"].rows(index), wanted)  # type: ignore[union-attr]


def test_the_map_beside_an_export(tmp_path: Path) -> None:
    tokenizer = wordpiece()
    found = vocabulary(tokenizer, 0.6)
    build(description("bert"), MASKED_LM).config.save_pretrained(tmp_path)
    assert read_vocabulary(tmp_path, tokenizer, "here") is None
    found.save(tmp_path)
    again = read_vocabulary(tmp_path, tokenizer, "here")
    assert again is not None
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in found.state_dict().items())
    with pytest.raises(DataError, match="another tokenizer") as error:
        read_vocabulary(tmp_path, bpe(), "here")
    assert "tokenizer.path" in str(error.value)
    file = tmp_path / "vocabulary_map.json"
    values = json.loads(file.read_text())
    for broken in ({**values, "kept": [999]}, {**values, "to_kept": [-1] * len(values["to_kept"])}, {"kept": []}, []):
        file.write_text(json.dumps(broken))
        with pytest.raises(DataError, match="not a vocabulary map"):
            read_vocabulary(tmp_path, tokenizer, "here")


def test_special_ids_have_new_numbers() -> None:
    whole = build(description("llama"), CAUSAL_LM)
    config = whole.config
    config.pad_token_id, config.bos_token_id, config.eos_token_id = 7, 9, [9, 12]
    found = VocabularyMap(torch.tensor([2, 7, 9, 12]), torch.zeros(61, dtype=torch.int64), torch.zeros(61), "x")
    found.to_kept[found.kept] = torch.arange(4)
    model = compress_model(whole, CAUSAL_LM, found, seed=0)
    small = model.config
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (2, [2, 3])
    assert (small.vocab_size, small.pad_token_id, small.bos_token_id, small.eos_token_id) == (4, 1, 2, [2, 3])


def test_teachers_keep_their_vocabulary() -> None:
    with pytest.raises(ValidationError, match="vocabulary is for students"):
        teacher_config({"model": ModelConfig(path="x", vocabulary=VocabularyConfig(keep=0.5))})


def test_prompts_are_counted_as_they_are_written() -> None:
    """A template's own words, and the turns of a chat, are tokens of every example."""
    tokenizer, columns = bpe(), {"q": ["ab abc", "cab"], "a": ["bad dab", " "]}  # a blank response is no example
    raw = Raw({"train": Dataset.from_dict(columns)}, "0" * 64, "test")
    table = torch.randn(num_real_ids(tokenizer), 8, generator=torch.Generator().manual_seed(0))
    config = build(description("gpt2"), CAUSAL_LM).config
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    for chat, written in (
        (False, ["dada {ab abc}: ", "bad dab"]),
        (True, ["<s>user: dada {ab abc}: </s><s>assistant: ", "bad dab</s>"]),
    ):
        data = DataConfig(source="files", prompt="dada {{{q}}}: ", text="a", chat=chat)
        made = make_vocabulary(VocabularyConfig(keep=0.999), data, raw, tokenizer, config, table)
        assert made.counts.tolist() == count_ids(tokenizer, written, num_real_ids(tokenizer)).tolist()
    turns = [{"role": "user", "content": "ab abc"}, {"role": "assistant", "content": "bad dab"}]
    chats = replace(raw, splits={"train": Dataset.from_dict({"m": [json.dumps(turns)], "q": ["ab abc"]})})
    asked = "<s>user: ab abc</s><s>assistant: "
    for fields, text in (
        ({"messages": "m"}, f"{asked}bad dab</s>"),
        ({"prompt": "q", "chat": True, "prompts_only": True}, asked),
    ):
        data = DataConfig(source="files", **fields)
        made = make_vocabulary(VocabularyConfig(keep=0.999), data, chats, tokenizer, config, table)
        assert made.counts.tolist() == count_ids(tokenizer, [text], num_real_ids(tokenizer)).tolist()
