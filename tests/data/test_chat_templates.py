"""Chat templates that a run gives its tokenizer: what is marked, what ends an answer, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_examples import sentences
from pydantic import ValidationError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mtkd.config import TokenizerConfig
from mtkd.config.read import load_config
from mtkd.data.chat_templates import BUILT_IN, ChatTemplate, find_template, give_template, turn_end
from mtkd.data.conversations import write_chats
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.planning.locate import made_tokenizer
from mtkd.planning.tokenizer import PlannedTokenizer

ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "alpaca": "</s>"}
TURNS = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "the teacher"},
    {"role": "assistant", "content": "a student"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "share", "arguments": {"loss": 1}}}]},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "and too"},
]


def with_template(template: ChatTemplate, *more: str) -> PreTrainedTokenizerFast:
    made = train_tokenizer(sentences(200), 400, special_tokens=(*template.tokens, *more))
    give_template(made, template, more, trained=True)
    return made


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_marks_are_what_prefixes_give(name: str) -> None:
    """Two ways to the same characters; the end is one token that ends texts too."""
    tokenizer = with_template(BUILT_IN[name])
    assert tokenizer.eos_token == ENDS[name]
    assert turn_end(tokenizer) == tokenizer.eos_token_id
    [marked] = write_chats(tokenizer, [TURNS], str)
    text = BUILT_IN[name].text.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer.chat_template = text
    [plain] = write_chats(tokenizer, [TURNS], str)
    assert marked.text == plain.text
    call = '<tool_call>{"name": "share", "arguments": {"loss": 1}}</tool_call>'
    for chat in (marked, plain):
        said = [chat.text[start:end].rstrip() for _, start, end in chat.answers]
        assert said == [f"{each}{ENDS[name]}" for each in ("a student", call, "and too")]
    assert [a[:2] for a in marked.answers] == [a[:2] for a in plain.answers]


@pytest.mark.parametrize("name", BUILT_IN)
def test_special_tokens_are_single_ids_and_count(name: str, tmp_path: Path) -> None:
    """Also after saving and loading by plain transformers, template included."""
    tokenizer = with_template(BUILT_IN[name])
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for each in (tokenizer, again):
        assert num_real_ids(each) <= 400
        for token in BUILT_IN[name].tokens:
            assert len(each(token, add_special_tokens=False)["input_ids"]) == 1
            assert each.decode(each(token)["input_ids"], skip_special_tokens=True) == ""
    assert again.eos_token == ENDS[name]
    assert again.apply_chat_template(TURNS) == tokenizer.apply_chat_template(TURNS)


def test_without_a_template_a_trained_tokenizer_is_what_it_was() -> None:
    plain, named = train_tokenizer(sentences(200), 400), train_tokenizer(sentences(200), 400, special_tokens=("<pad>",))
    assert plain.get_vocab() == named.get_vocab()
    assert plain.eos_token == "</s>"


def run_file(folder: Path, tokenizer: str) -> Path:
    (folder / "t.txt").write_text("\n\n".join(sentences(20)))
    (folder / "r.yaml").write_text(
        f"name: r\ntokenizer: {tokenizer}\ndata: {{t: {{source: files, files: {{train: t.txt}}}}}}\n"
        "stages: {s: {kind: finetune, student: {architecture: llama, layers: 1, width: 32, heads: 2}, steps: 1}}\n"
    )
    return folder / "r.yaml"


def test_a_template_of_a_file(tmp_path: Path) -> None:
    """Relative to the run's file; its tokens are named, and the one behind an answer ends texts."""
    (tmp_path / "own.jinja").write_text(
        "{% for m in messages %}<a>{{ m.role }}: {{ m.content }}<z>{% endfor %}"
        "{% if add_generation_prompt %}<a>assistant: {% endif %}"
    )
    file = run_file(
        tmp_path, '{train_on: t, vocab_size: 300, chat_template: own.jinja, special_tokens: ["<a>", "<z>"]}'
    )
    config = load_config(file)
    made = made_tokenizer(config, sentences(20))
    assert made.eos_token == "<z>"
    assert made.chat_template == (tmp_path / "own.jinja").read_text()
    assert PlannedTokenizer(config).tokenizer.eos_token == "<z>"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        (b"\xff\xfe\x00", "not UTF-8"),
        ("x" * 1_000_001, "too large"),
        ("{% for m in messages %}{{ m.content }}", "TemplateSyntaxError"),
        ("{{ strftime_now('%Y') }}", "date"),
        ("hello", "leaves out the prompt"),
        ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "nothing ends an answer"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}bye{% endfor %}",
            "nothing ends an answer",
        ),
    ],
)
def test_templates_that_are_refused_while_the_run_is_planned(
    tmp_path: Path, content: str | bytes, message: str
) -> None:
    (tmp_path / "own.jinja").write_bytes(content.encode() if isinstance(content, str) else content)
    config = load_config(run_file(tmp_path, "{train_on: t, vocab_size: 300, chat_template: own.jinja}"))
    with pytest.raises(DataError, match=message) as refused:
        PlannedTokenizer(config)
    assert refused.value.where == "tokenizer.chat_template"


def test_a_name_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such chat template") as refused:
        find_template("chatlm", tmp_path)
    assert (refused.value.where, refused.value.todo) == ("tokenizer.chat_template", "did you mean 'chatml'?")


def test_a_loaded_tokenizer_must_have_the_tokens(tmp_path: Path) -> None:
    """Its models have no row for others; alpaca needs none, and the loaded one's ids and end stay."""
    train_tokenizer(sentences(200), 400).save_pretrained(tmp_path / "plain")
    with pytest.raises(DataError, match="lacks a token") as refused:
        PlannedTokenizer(load_config(run_file(tmp_path, f"{{path: {tmp_path}/plain, chat_template: chatml}}")))
    assert refused.value.found == "<|im_start|>"
    loaded = PlannedTokenizer(load_config(run_file(tmp_path, f"{{path: {tmp_path}/plain, chat_template: alpaca}}")))
    assert loaded.tokenizer.chat_template == BUILT_IN["alpaca"].text
    assert loaded.tokenizer.eos_token == "</s>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "x", "special_tokens": ["<a>"]}, "of a trained tokenizer"),
        ({"train_on": "x", "commands": "glm", "chat_template": "chatml"}, "special tokens of GLM"),
        ({"train_on": "x", "special_tokens": ["<a>", "<a>"]}, "of its own"),
        ({"train_on": "x", "special_tokens": [" <a>"]}, "of its own"),
        ({"train_on": "x", "special_tokens": [""]}, "of its own"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**fields)


def test_too_few_ids_for_the_tokens(tmp_path: Path, write: Callable[..., object]) -> None:
    config = load_config(run_file(tmp_path, "{train_on: t, vocab_size: 262, chat_template: chatml}"))
    with pytest.raises(UserError, match="too few ids") as refused:
        PlannedTokenizer(config)
    assert refused.value.allowed == "at least 263"
