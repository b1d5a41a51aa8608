"""Instruction data: what is predicted and what is not, by place; beginnings, ends, templates, truncation, bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from data_examples import load_raw, sentences
from pydantic import ValidationError
from tiny import causal_model, make_objective
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig, prompt_parts
from mtkd.data.batch import NO_LABEL
from mtkd.data.load import LoadedData, load_data
from mtkd.data.sources import check_source
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.methods.papers import kd
from mtkd.models.features import HeadLogits
from mtkd.planning.data import DataReader

Loader = Callable[..., LoadedData]
PROMPTS = ["the teacher and", "a student", "one vocabulary while the loss, weight & feature"]
RESPONSES = ["share one", "things – too the teacher", "naïve 漢字"]
CHAT = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def opened() -> PreTrainedTokenizerFast:
    """As for language models: with beginning and end tokens, which also pad."""
    made = train_tokenizer(sentences(200), 400)
    made.pad_token = made.eos_token
    return made


def prompted(load: Loader, tokenizer: PreTrainedTokenizerFast, **fields: object) -> LoadedData:
    columns = {"question": PROMPTS, "answer": RESPONSES}
    return load(columns, tokenizer, **{"prompt": "question", "text": "answer", **fields})


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_response_and_the_end_are_predicted_and_nothing_else(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    split = prompted(load, opened).splits["train"]
    batch = split.collate([0, 1, 2])
    for row, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        before = [opened.bos_token_id, *ids(opened, prompt)]
        after = [*ids(opened, response), opened.eos_token_id]
        length = int(batch.attention_mask[row].sum())
        assert batch.input_ids[row, :length].tolist() == [*before, *after[:-1]]
        targets = batch.targets[row, :length].tolist()
        assert targets == [NO_LABEL] * (len(before) - 1) + after
        assert split.document_bytes[row] == len(response.encode())
    assert not split.note


def test_masked_by_place_not_by_id(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """The prompt is the response, and holds the token that also pads and ends."""
    text = f"the loss,{opened.eos_token} the"
    split = load({"q": [text], "text": [text]}, opened, prompt="q").splits["train"]
    targets = split.collate([0]).targets[0]
    n = len(ids(opened, text))
    assert opened.eos_token_id in ids(opened, text)
    assert targets.tolist() == [NO_LABEL] * n + [*ids(opened, text), opened.eos_token_id]


def test_the_teacher_counts_from_the_last_prompt_position_on(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """Trap 10, for a teacher row and its weighting: what the teacher says anywhere else changes nothing."""
    batch = prompted(load, opened).splits["train"].collate([0, 1])
    batch.input_ids, batch.targets = batch.input_ids % 61, batch.targets.where(batch.targets < 0, batch.targets % 61)
    objective, pool = make_objective(
        causal_model(16, 1, 0), [causal_model(24, 1, 1)], list(kd(temperature=2.0).values()), "mt_bert"
    )
    counts = dict.fromkeys(("tokens", "targets", "sequences", "labels"), 1)

    def loss(row: int | None, position: int) -> float:
        features = pool.forward(batch)
        logits = features[0]["logits"]
        assert isinstance(logits, HeadLogits)
        if row is not None:
            logits.hidden[row, position] += torch.linspace(-3, 3, 24)
        return float(objective(batch, features, counts)[0])

    before = loss(None, 0)
    for row, prompt in enumerate(PROMPTS[:2]):
        last_prompt, last = len(ids(opened, prompt)), int(batch.attention_mask[row].sum())
        for position in range(batch.input_ids.shape[1]):
            # the last input predicts the end token; the end token itself is no input
            assert (loss(row, position) != before) == (last_prompt <= position < last), (row, position)


def test_templates_of_columns(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    columns = {"instruction": ["the", "a"], "input": ["teacher", ""], "output": ["and", "one"]}
    template = load(columns, opened, prompt="{instruction}\n{input}{{}}\n", text="output").splits["train"]
    written = load({"p": ["the\nteacher{}\n", "a\n{}\n"], "output": ["and", "one"]}, opened, prompt="p", text="output")
    for found in (template, written.splits["train"]):
        assert torch.equal(found.collate([0, 1]).input_ids, template.collate([0, 1]).input_ids)
    with pytest.raises(DataError, match="no column 'instructions'"):
        load(columns, opened, prompt="{instructions}", text="output")


def test_a_list_of_columns_leaves_out_the_empty_ones(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """Alpaca's input is often empty: no blank line stands in its place; a chat template parts the turns itself."""
    columns = {"instruction": ["the", "a"], "input": ["teacher", " "], "output": ["and", "one"]}
    for chat, written in ((False, ["the\nteacher\n", "a\n"]), (True, ["the\nteacher", "a"])):
        opened.chat_template = CHAT if chat else None
        try:
            made = load(columns, opened, prompt=["instruction", "input"], text="output", chat=chat)
            plain = load({"p": written, "output": ["and", "one"]}, opened, prompt="p", text="output", chat=chat)
        finally:
            opened.chat_template = None
        for row in (0, 1):
            found, expected = made.splits["train"].collate([row]), plain.splits["train"].collate([row])
            assert torch.equal(found.input_ids, expected.input_ids)
            assert torch.equal(found.targets, expected.targets)
    headed = load(columns, opened, prompt=["Do: {instruction}", "With: {input}"], text="output").splits["train"]
    assert "Do: a\none" in opened.decode(headed.collate([1]).input_ids[0])
    for wrong in ([], [""], ["{a"]):
        with pytest.raises(ValidationError):
            DataConfig(source="files", prompt=wrong)


@pytest.mark.parametrize("prompt", ["{a", "{}", "{a!r}", "{a:>9}", "}{", "{{a}}"])
def test_malformed_templates_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match=r"[Pp]rompt|format|brace|'}'|'{'"):
        prompt_parts(prompt)


def test_chat_templates(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="no chat template") as refused:
        prompted(load, opened, chat=True)
    assert refused.value.where == "data.corpus.chat"
    opened.chat_template = CHAT
    try:
        batch = prompted(load, opened, chat=True).splits["train"].collate([1])
        before = ids(opened, f"<s>user: {PROMPTS[1]}</s><s>assistant: ")
        whole = [*before, *ids(opened, f"{RESPONSES[1]}</s>")]
        assert batch.input_ids[0].tolist() == whole[:-1]
        assert batch.targets[0].tolist() == [NO_LABEL] * (len(before) - 1) + whole[len(before) :]
        chat, plain = (prompted(load, opened, chat=chat).fingerprint for chat in (True, False))
        opened.chat_template = "Answer wrongly. " + CHAT
        assert prompted(load, opened, chat=True).fingerprint != chat
        assert prompted(load, opened).fingerprint == plain
        opened.chat_template = CHAT.replace("{{ turn.content }}", "{{ turn.content }}{{ loop.length }}")
        with pytest.raises(DataError, match="differently"):
            prompted(load, opened, chat=True)
    finally:
        opened.chat_template = None


def test_the_chat_template_is_a_part_of_the_data(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    """Only where it writes the text: a cache made under another template is the cache of other inputs."""
    plain, found = prompted(load, opened).fingerprint, []
    try:
        for template in (CHAT, "Answer wrongly. " + CHAT):
            opened.chat_template = template
            found.append(prompted(load, opened, chat=True).fingerprint)
            assert prompted(load, opened).fingerprint == plain
    finally:
        opened.chat_template = None
    assert found[0] != found[1]


def test_every_example_keeps_a_response_token(load: Loader, opened: PreTrainedTokenizerFast) -> None:
    whole = prompted(load, opened).splits["train"]
    prompts = [1 + len(ids(opened, prompt)) for prompt in PROMPTS]
    for longest in range(min(prompts), int(whole.lengths.max()) + 1):
        split = prompted(load, opened, max_length=longest).splits["train"]
        assert len(split) == sum(p <= longest for p in prompts)  # one row is one example, never cut into blocks
        batch = split.collate(range(len(split)))
        assert bool((batch.targets != NO_LABEL).any(1).all())
        assert int(split.lengths.max()) <= longest
        names = [f"train:{i + 1}" for i, p in enumerate(prompts) if p <= longest]
        assert split.document_names == names
        lost = len(prompts) - len(split)
        assert (f"{lost} of 3 rows left out" in split.note) == (lost > 0)
        cut = sum(p <= longest < n for p, n in zip(prompts, whole.lengths, strict=True))
        assert (f"{cut} of {len(split)} responses cut" in split.note) == (cut > 0)
        assert all(split.document_bytes <= [len(RESPONSES[int(n[6:]) - 1].encode()) for n in names])
    with pytest.raises(DataError, match="no prompt leaves room"):
        prompted(load, opened, max_length=min(prompts) - 1)


def test_without_a_beginning_and_a_prompt_the_first_token_is_only_read(
    load: Loader, opened: PreTrainedTokenizerFast
) -> None:
    bos = opened.bos_token
    opened.bos_token = None
    try:
        split = load({"q": ["", "a"], "text": ["share one", "share one"]}, opened, prompt="q").splits["train"]
        batch = split.collate([0, 1])
        response = [*ids(opened, "share one"), opened.eos_token_id]
        assert batch.targets[0, : len(response) - 1].tolist() == response[1:]
        first = len(opened.decode(response[:1]).encode())
        assert split.document_bytes.tolist() == [len(b"share one") - first, len(b"share one")]
    finally:
        opened.bos_token = bos


ROWS = [{"instruction": p, "input": "", "output": r} for p, r in zip(PROMPTS, RESPONSES, strict=True)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.json", json.dumps(ROWS, indent=2, ensure_ascii=False)),
        ("rows.json", json.dumps(ROWS)),
        ("rows.jsonl", "\n".join(map(json.dumps, ROWS))),
    ],
)
def test_arrays_and_lines_of_objects_are_the_same_data(
    name: str, content: str, write: Callable[..., DataConfig], tmp_path: Path, load: Loader,
    opened: PreTrainedTokenizerFast,
) -> None:  # fmt: skip
    config = write(name, content, prompt="{instruction}{input}", text="output")
    split = load_data("rows", config, load_raw(config, tmp_path), opened).splits["train"]
    expected = prompted(load, opened).splits["train"]
    assert np.array_equal(split.document_bytes, expected.document_bytes)
    assert torch.equal(split.collate([0, 1, 2]).targets, expected.collate([0, 1, 2]).targets)


def test_what_cannot_be_is_refused_at_once(write: Callable[..., DataConfig], tmp_path: Path) -> None:
    for fields in ({"chat": True}, {"prompt": ""}, {"prompt": "text"}, {"prompt": "{text}{a}"}, {"prompt": "{a"},
                   {"prompt": r"{a}\n"}, {"prompt": "a", "transfer": {"tokens": "uniform"}}):  # fmt: skip
        with pytest.raises(ValidationError):
            DataConfig(source="files", **fields)
    config = write("rows.jsonl", json.dumps(ROWS[0]), prompt="{question}", text="output")
    with pytest.raises(DataError, match="no column 'question'"):
        check_source(config, tmp_path)
    config = write("rows.jsonl", json.dumps(ROWS[0]), prompt="input", text="output", task="masked-lm")
    with pytest.raises(UserError, match="does not read this"):
        check_source(config, tmp_path)


def test_prompts_that_are_blank_in_every_row_are_refused(write: Callable[..., DataConfig], tmp_path: Path) -> None:
    """A row may lack a prompt; when all do, the wrong column was named. The same holds for a cloze."""
    blank = [{**row, "instruction": " "} for row in ROWS]
    for rows, ok in ((ROWS, True), ([ROWS[0], *blank], True), (blank, False)):
        content = "\n".join(map(json.dumps, rows))
        prompt = write("rows.jsonl", content, prompt="Asked: {instruction}{input}", text="output")
        words = {"yes": "yes", "no": "no"}
        cloze = write("rows.jsonl", content, cloze="{instruction} [MASK]", task="glm-cloze", verbalizers=words)
        if ok:
            assert DataReader(tmp_path).facts("rows", prompt).rows == {"train": len(rows)}
            continue
        for config, what in ((prompt, "prompt"), (cloze, "cloze")):
            with pytest.raises(DataError, match=f"no row has a text for the {what}") as refused:
                DataReader(tmp_path).facts("rows", config)
            assert "instruction" in str(refused.value.found)
