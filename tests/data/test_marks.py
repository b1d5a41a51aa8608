"""A beginning or end token that a text brings along is there once, in every task."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from data_examples import sentences
from tiny_glm import tokenizer as glm_tokenizer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mtkd.data.batch import NO_LABEL
from mtkd.data.load import LoadedData
from mtkd.data.marks import Marks
from mtkd.data.tokenizers import train_tokenizer

Loader = Callable[..., LoadedData]
CHAT = (
    "<s>{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{{ '</s>' if turn.role == 'assistant' else ' ' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def opened() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(200), 400)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """WordPiece with [CLS] a [SEP] b [SEP], as BERT."""
    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "teacher", "shows", "a", "student"]
    ids = {word: number for number, word in enumerate(known)}
    core = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    parts = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=core, **{f"{part}_token": token for part, token in parts.items()})


def same_examples(one: LoadedData, other: LoadedData) -> None:
    """The same ids, targets and bytes; another fingerprint, because an older cache has the tokens twice."""
    ours, theirs = one.splits["train"], other.splits["train"]
    rows = range(len(theirs))
    assert len(ours) == len(theirs)
    assert torch.equal(ours.collate(rows).input_ids, theirs.collate(rows).input_ids)
    assert torch.equal(ours.collate(rows).targets, theirs.collate(rows).targets)
    assert ours.document_bytes.tolist() == theirs.document_bytes.tolist()
    assert "their own beginning or end token" in ours.note
    assert not theirs.note
    assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    ("text", "bare"),
    [("<s>a</s>", "a"), ("<s><s>a", "a"), (" \n<s> a", " a"), ("a </s>\n", "a "), ("a</s>b", "a</s>b"), ("<s>", ""),
     ("</s>", ""), ("a<s>", "a<s>"), ("", ""), (" a ", " a ")],
)  # fmt: skip
def test_own_marks_at_the_ends_and_nowhere_else(text: str, bare: str) -> None:
    assert Marks(("<s>",), ("</s>",)).bare(text) == bare


def test_one_mark_for_both_ends() -> None:
    assert Marks(("<e>",), ("<e>",)).bare("<e>a<e>") == "a"
    assert Marks(("<e>",), ("<e>",)).bare("<e>") == ""


def test_prompts_and_responses(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """The issue's case: a prompt that was formatted by a template, with `chat: false`."""
    own = load({"q": ["<s>the teacher", " <s>a"], "text": ["shows</s>", "student </s>\n"]}, opened, prompt="q")
    bare = load({"q": ["the teacher", "a"], "text": ["shows", "student "]}, opened, prompt="q")
    same_examples(own, bare)
    batch = own.splits["train"].collate([0, 1])
    for row in range(2):
        length = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, :length].tolist().count(opened.bos_token_id) == 1
        targets = batch.targets[row, :length]
        assert targets[targets != NO_LABEL].tolist().count(opened.eos_token_id) == 1
        assert targets[-1] == opened.eos_token_id


def test_a_formatted_prompt_is_what_the_template_writes(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """`chat: false` with the template's text in the prompt is `chat: true`."""
    opened.chat_template = CHAT
    try:
        turns = load({"q": ["the teacher"], "text": ["shows"]}, opened, prompt="q", chat=True).splits["train"]
        again = load({"q": ["<s>the teacher"], "text": ["shows</s>"]}, opened, prompt="q", chat=True).splits["train"]
    finally:
        opened.chat_template = None
    columns = {"q": ["<s>user: the teacher assistant: "], "text": ["shows</s>"]}
    written = load(columns, opened, prompt="q").splits["train"]
    for each in (written, again):
        assert torch.equal(each.collate([0]).input_ids, turns.collate([0]).input_ids)
        assert torch.equal(each.collate([0]).targets, turns.collate([0]).targets)


@pytest.mark.parametrize("pads", ["<pad>", "</s>", None])
def test_documents_of_a_language_model(load: Loader, pads: str | None) -> None:
    """Whatever pads; a text of marks alone is blank."""
    tokenizer = train_tokenizer(sentences(200), 400)
    tokenizer.pad_token = pads
    texts = ["the teacher shows", "a student </s> the teacher"]
    own = load({"text": ["<s>the teacher shows</s>", "<s></s>", "a student </s> the teacher</s>"]}, tokenizer)
    plain = load({"text": texts}, tokenizer)
    assert [name.split(":")[1] for name in own.splits["train"].document_names] == ["1", "3"]
    same_examples(own, plain)


def test_a_tokenizer_without_ends_leaves_texts_alone(load: Loader) -> None:
    tokenizer = train_tokenizer(sentences(200), 400)
    tokenizer.bos_token = tokenizer.eos_token = None
    split = load({"text": ["<s>the teacher</s>"]}, tokenizer).splits["train"]
    assert split.collate([0]).input_ids[0, 0] == 1
    assert not split.note


@pytest.mark.parametrize(
    "fields", [{"task": "masked-lm", "redraw": False}, {"task": "masked-lm", "next_sentence": True}]
)
def test_masked_texts(load: Loader, words: PreTrainedTokenizerFast, fields: dict[str, object]) -> None:
    own = load({"text": ["[CLS] the teacher shows [SEP]", "a student"]}, words, **fields)
    same_examples(own, load({"text": [" the teacher shows ", "a student"]}, words, **fields))


def test_classified_texts_and_pairs(load: Loader, words: PreTrainedTokenizerFast) -> None:
    labels = {"label": ["x", "y"]}
    own = load({"text": ["[CLS] the teacher [SEP]", "a"], **labels}, words, task="classify")
    same_examples(own, load({"text": [" the teacher ", "a"], **labels}, words, task="classify"))
    pair = {"task": "classify", "text_pair": "other"}
    texts = {"text": ["[CLS] the teacher [SEP]", "a"], "other": ["[SEP] shows a student [SEP]", "the"]}
    own = load({**texts, **labels}, words, **pair)
    same_examples(
        own, load({"text": [" the teacher ", "a"], "other": [" shows a student ", "the"], **labels}, words, **pair)
    )
    ids = own.splits["train"].collate([0]).input_ids[0].tolist()
    assert (ids.count(2), ids.count(3)) == (1, 2)


def test_clozes(load: Loader) -> None:
    tokenizer = glm_tokenizer()
    first, last = tokenizer.cls_token, tokenizer.eos_token
    fields = {"task": "glm-cloze", "verbalizers": {"x": " x", "y": " y"}}
    columns = {"text": ["one two", "three"], "label": ["x", "y"]}
    own = load(columns, tokenizer, cloze=f"{first}{{text}} [MASK]{last}", **fields)
    plain = load(columns, tokenizer, cloze="{text} [MASK]", **fields)
    assert torch.equal(own.splits["train"].collate([0, 1]).input_ids, plain.splits["train"].collate([0, 1]).input_ids)
    short = {"max_length": int(plain.splits["train"].lengths[0]) - 1}
    cut, bare = (
        load(columns, tokenizer, cloze=cloze, **fields, **short).splits["train"]
        for cloze in (f"{first}{{text}} [MASK]{last}", "{text} [MASK]")
    )
    assert torch.equal(cut.collate([0, 1]).input_ids, bare.collate([0, 1]).input_ids)
