"""Chats of several turns: which tokens are predicted, under the templates that people have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_styles import FORGETS, SPECIAL, STYLES, without_marks
from data_examples import sentences
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

import mtkd
from mtkd.config import DataConfig
from mtkd.config.read import load_config
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError

Loader = Callable[..., LoadedData]
Turns = list[dict[str, Any]]


def said(*contents: str, roles: str = "") -> Turns:
    """Turns of user and assistant by turns, or of the roles whose first letters are given."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    who = roles or "ua" * len(contents)
    return [{"role": names[r], "content": content} for r, content in zip(who, contents, strict=False)]


LONG = said("the teacher", "a student", "one vocabulary", "naïve 漢字", "and the loss", "too")


@pytest.fixture(scope="module")
def chatty() -> PreTrainedTokenizerFast:
    made = train_tokenizer(sentences(200), 400)
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def chats(
    load: Loader, tokenizer: PreTrainedTokenizerFast, template: str, *rows: Turns, **fields: object
) -> LoadedData:
    tokenizer.chat_template = template
    return load({"messages": [json.dumps(row) for row in rows]}, tokenizer, messages="messages", **fields)


def answers(tokenizer: PreTrainedTokenizerFast, batch: Batch, row: int = 0) -> list[str]:
    """The stretches of tokens that are predicted, as text."""
    found: list[list[int]] = [[]]
    for target in batch.targets[row].tolist():
        if target == NO_LABEL:
            found.append([])
        else:
            found[-1].append(target)
    return [str(tokenizer.decode(ids)) for ids in found if ids]


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
@pytest.mark.parametrize(
    ("style", "end"), [("chatml", "<|im_end|>"), ("headers", "<|eot|>"), ("no-system", "<|/turn|>"), ("plain", "\n")]
)
def test_the_assistants_turns_and_their_ends_are_predicted(
    load: Loader, chatty: PreTrainedTokenizerFast, style: str, end: str, marks: bool
) -> None:
    """With marks and without them alike; the text is the template's, and what is predicted follows what is read."""
    template = STYLES[style] if marks else without_marks(STYLES[style])
    split = chats(load, chatty, template, LONG).splits["train"]
    batch = split.collate([0])
    assert answers(chatty, batch) == [f"{turn['content']}{end}" for turn in LONG if turn["role"] == "assistant"]
    whole = chatty.apply_chat_template(LONG, tokenize=True, return_dict=False)
    inputs, targets = batch.input_ids[0].tolist(), batch.targets[0].tolist()
    assert inputs == whole[: len(inputs)]
    assert all(target in (NO_LABEL, whole[place + 1]) for place, target in enumerate(targets))
    assert targets[-1] != NO_LABEL
    assert split.document_bytes[0] == sum(len(t["content"].encode()) for t in LONG if t["role"] == "assistant")
    assert not split.note


def test_the_mask_is_that_of_transformers(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    """`return_assistant_tokens_mask` computes it from characters of the whole text."""
    rows = [LONG, said("s", "the teacher", "and", "one", "things", "too", roles="suauau")[:5], LONG[:2]]
    batch = chats(load, chatty, STYLES["chatml"], *rows).splits["train"].collate([0, 1, 2])
    for row, turns in enumerate(rows):
        theirs = chatty.apply_chat_template(turns, return_assistant_tokens_mask=True, return_dict=True)
        mask = torch.tensor(theirs["assistant_masks"], dtype=torch.bool)[1:]
        length = int(batch.attention_mask[row].sum())
        assert not mask[length:].any()
        assert torch.equal(batch.targets[row, :length] != NO_LABEL, mask[:length])


@pytest.mark.parametrize("marks", [True, False], ids=["marks", "prefixes"])
def test_system_turns_and_results_of_tools_are_read(load: Loader, chatty: PreTrainedTokenizerFast, marks: bool) -> None:
    call = {"type": "function", "function": {"name": "share", "arguments": {"loss": 1}}}
    turns = said("a student", "the teacher", "", "one", "too", roles="suata")
    turns[2] = {"role": "assistant", "tool_calls": [call], "content": ""}
    template = STYLES["headers"] if marks else without_marks(STYLES["headers"])
    split = chats(load, chatty, template, turns).splits["train"]
    written = json.dumps(call["function"])
    assert answers(chatty, split.collate([0])) == [f"{written}<|eot|>", "too<|eot|>"]
    assert split.document_bytes[0] == len(written) + len("too")


def test_one_question_is_a_prompt_with_its_answer(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    """The same tokens as `prompt`, `text` and `chat`; the line end behind the end token alone is not asked."""
    for style in STYLES.values():
        split = chats(load, chatty, without_marks(style), LONG[:2], LONG[2:4]).splits["train"]
        columns = {"q": [LONG[0]["content"], LONG[2]["content"]], "a": [LONG[1]["content"], LONG[3]["content"]]}
        pair = load(columns, chatty, prompt="q", text="a", chat=True).splits["train"]
        for row in range(2):
            ours, theirs = split.collate([row]), pair.collate([row])
            length = ours.input_ids.shape[1]
            assert torch.equal(ours.input_ids, theirs.input_ids[:, :length])
            assert torch.equal(ours.targets, theirs.targets[:, :length])
            rest = theirs.targets[0, length:]
            assert chatty.decode(rest).strip() == ""
        assert split.document_bytes.tolist() == pair.document_bytes.tolist()


def test_the_last_answer_alone(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    for template in (STYLES["chatml"], without_marks(STYLES["chatml"])):
        batch = chats(load, chatty, template, LONG, mask_history=True).splits["train"].collate([0])
        assert answers(chatty, batch) == ["too<|im_end|>"]
    weighed = [*LONG[:1], {**LONG[1], "weight": 0}, *LONG[2:]]
    batch = chats(load, chatty, STYLES["chatml"], weighed).splits["train"].collate([0])
    assert answers(chatty, batch) == ["naïve 漢字<|im_end|>", "too<|im_end|>"]


THOUGHT = said("the teacher", "<think>loss</think>a student", "one", "<think>too</think>and")


def test_a_template_that_forgets_what_it_wrote(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    """Prefixes do not tell where the first answer stands, and the row and turn are named; marks do, the last does."""
    forgets = without_marks(FORGETS)
    with pytest.raises(DataError, match="differently when turn 3 follows") as refused:
        chats(load, chatty, forgets, LONG, THOUGHT)
    error = refused.value
    assert error.where == "train, row 2, turn 2"
    assert "student" in error.found
    assert "<think>loss" in error.allowed
    assert "mask_history: true" in error.todo
    assert "generation" in error.todo
    last = chats(load, chatty, forgets, LONG, THOUGHT, mask_history=True).splits["train"]
    assert answers(chatty, last.collate([1])) == ["<think>too</think>and<|im_end|>"]
    marked = chats(load, chatty, FORGETS, THOUGHT).splits["train"]
    assert answers(chatty, marked.collate([0])) == ["a student<|im_end|>", "<think>too</think>and<|im_end|>"]


def test_a_template_that_moves_the_system_turn(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    turns = said("one vocabulary", "the teacher", "a", "and", "too", roles="suaua")
    with pytest.raises(DataError, match="differently") as refused:
        chats(load, chatty, without_marks(STYLES["system-last"]), turns)
    assert refused.value.where == "train, row 1, turn 3"
    batch = chats(load, chatty, STYLES["system-last"], turns).splits["train"].collate([0])
    assert answers(chatty, batch) == ["a</s>", "too</s>"]
    assert "<|inst|>one vocabulary\nand<|/inst|>" in chatty.decode(batch.input_ids[0])


def test_a_role_that_the_template_does_not_know(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="refuses the turns") as refused:
        chats(load, chatty, STYLES["no-system"], LONG, said("one", "the", "and", roles="sua"))
    assert refused.value.where == "train, row 2"
    assert "System role not supported" in refused.value.found


def test_tokens_over_the_border_of_a_turn_are_refused(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    """A model that writes reads the opening's tokens, not one that holds the first letters of the answer too."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(DataError, match="no token ends at the beginning of the assistant's turn") as refused:
        chats(load, chatty, template, said("the", "the teacher"), said("teach", "er and"))
    assert refused.value.where == "train, row 2, turn 2"
    assert "teacher" in refused.value.found


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (STYLES["chatml"].replace("{% if m.role == 'assistant' %}", "{% if loop.last %}"), "mark every turn"),
        (
            STYLES["chatml"]
            .replace("{% generation %}", "{% generation %}{% endgeneration %}", 1)
            .replace("<|im_end|>{% endgeneration %}", "<|im_end|>", 1),
            "mark every turn",
        ),
        (
            "{% macro w(m) %}{{ m.role }}: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% endmacro %}"
            "{% for m in messages %}{% if m.role == 'assistant' %}{{ w(m) }}"
            "{% else %}{{ m.role ~ m.content }}{% endif %}"
            "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
            "marks another place",
        ),
    ],
)
def test_marks_that_are_wrong(load: Loader, chatty: PreTrainedTokenizerFast, template: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        chats(load, chatty, template, LONG)
    assert "row 1" in refused.value.where


def test_max_length_cuts_the_end_and_counts_what_is_left(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    chatty.chat_template = STYLES["chatml"]
    whole = chatty.apply_chat_template(LONG, tokenize=True, return_dict=False)
    first = len(chatty.apply_chat_template(LONG[:1], add_generation_prompt=True, return_dict=False))
    data = chats(load, chatty, STYLES["chatml"], LONG, said("the " * 30, "too"), max_length=first + 1)
    split = data.splits["train"]
    batch = split.collate([0])
    assert split.lengths.tolist() == [first + 1]
    assert batch.targets[0].tolist() == [NO_LABEL] * (first - 1) + whole[first : first + 2]
    assert split.document_bytes[0] == len(chatty.decode(whole[first : first + 2]))
    assert "1 of 2 rows left out" in split.note
    assert "1 of 1 responses cut" in split.note
    with pytest.raises(DataError, match="no prompt leaves room"):
        chats(load, chatty, STYLES["chatml"], LONG, max_length=3)


def test_what_a_rollout_reads(load: Loader, chatty: PreTrainedTokenizerFast) -> None:
    """The prompt is everything before the last answer; of prompts alone it is the example, and nothing is asked."""
    prompted = chats(load, chatty, STYLES["chatml"], LONG).splits["train"].prompted
    assert prompted is not None
    opened = chatty.apply_chat_template(LONG[:-1], add_generation_prompt=True, return_dict=False)
    assert prompted.prompt(0).tolist() == opened
    alone = chats(load, chatty, STYLES["chatml"], LONG[:-1], said("the"), prompts_only=True).splits["train"]
    batch = alone.collate([0, 1])
    assert batch.input_ids[0].tolist() == opened
    assert (batch.targets == NO_LABEL).all()
    assert not alone.has_targets
    assert alone.prompted is not None
    assert alone.prompted.prompts.tolist() == alone.lengths.tolist() == batch.attention_mask.sum(1).tolist()
    assert alone.prompted.prompt(0).tolist() == opened


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_alone(load: Loader, chatty: PreTrainedTokenizerFast, chat: bool) -> None:
    """No answer is read: the column need not be there; blank and long prompts are left out."""
    chatty.chat_template = STYLES["chatml"]
    columns = {"text": ["the teacher", " ", "a student", "one " * 99]}
    split = load(columns, chatty, prompt="text", prompts_only=True, chat=chat, max_length=20).splits["train"]
    full = load({**columns, "a": ["too"] * 4}, chatty, prompt="text", text="a", chat=chat, max_length=40)
    answered = full.splits["train"].prompted
    assert split.prompted is not None
    assert answered is not None
    assert len(split) == 2
    assert split.document_names == ["train:1", "train:3"]
    for number, row in enumerate((0, 2)):
        assert split.prompted.prompt(number).tolist() == answered.prompt(row).tolist()
    assert (split.collate([0, 1]).targets == NO_LABEL).all()
    assert "1 of 3 rows left out: the prompt is too long" in split.note


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": "m", "prompt": "p"}, "drop prompt"),
        ({"messages": "m", "chat": True}, "drop chat"),
        ({"messages": "m", "text": "t"}, "drop text"),
        ({"messages": " "}, "name of a column"),
        ({"messages": "m", "mask_history": True, "prompts_only": True}, "drop mask_history"),
        ({"mask_history": True}, "goes with `messages`"),
        ({"prompts_only": True}, "goes with `prompt` or `messages`"),
        ({"prompts_only": True, "prompt": "p", "text": "t"}, "does not read `text`"),
        ({"messages": "m", "transfer": {"tokens": "uniform"}}, "real texts"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig(source="files", **fields)


def test_stages_and_evaluation_refuse_prompts_alone(tmp_path: Path) -> None:
    """Before any file is tokenised: what is learned or scored is an answer."""
    (tmp_path / "q.jsonl").write_text('{"q": "one"}\n')
    (tmp_path / "r.yaml").write_text(
        "name: r\ntokenizer: {train_on: q}\n"
        "data: {q: {source: files, files: {train: q.jsonl, validation: q.jsonl}, prompt: q, prompts_only: true}}\n"
        "stages: {s: {kind: finetune, student: {architecture: llama, layers: 1, width: 32, heads: 2}, steps: 1}}\n"
        "evaluate: {split: validation}\n"
    )
    with pytest.raises(UserError, match="prompts alone") as refused:
        mtkd.plan(load_config(tmp_path / "r.yaml"))
    assert refused.value.where == "stages.s.data"
