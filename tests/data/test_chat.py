"""Chat templates are strangers' code: what they may not do is an error of the data entry, never of mtkd."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from data_examples import sentences
from transformers import PreTrainedTokenizerFast

import mtkd
from mtkd.config.read import load_config
from mtkd.data import chat
from mtkd.data.load import LoadedData
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import EXIT_DATA, DataError

Loader = Callable[..., LoadedData]
GOOD = (
    "{% for turn in messages %}<s>{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
COLUMNS = {"question": ["the teacher", "a student"], "answer": ["shares one", "and things"]}
ENDLESS = "{% for a in range(99999) %}" * 3 + "{% set b = a %}" + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def trained() -> PreTrainedTokenizerFast:
    return train_tokenizer(sentences(200), 400)


@pytest.fixture
def tokenizer(trained: PreTrainedTokenizerFast) -> Iterator[PreTrainedTokenizerFast]:
    yield trained
    trained.chat_template = None


def texts(load: Loader, tokenizer: PreTrainedTokenizerFast, template: object, **columns: list[str]) -> list[str]:
    tokenizer.chat_template = template
    data = load({**COLUMNS, **columns}, tokenizer, prompt="question", text="answer", chat=True)
    split = data.splits["train"]
    return [str(tokenizer.decode(split.collate([row]).input_ids[0])) for row in range(len(split))]


BROKEN: list[tuple[object, str, str]] = [
    ("{{ raise_exception('roles must alternate') }}", "refuses the turns", "roles must alternate"),
    ("{% for %}", "TemplateSyntaxError", "line 1"),
    (GOOD + "\n\n{{ messages[0] }", "TemplateSyntaxError", "line 3"),
    ("{{ messages[0].content | shout }}", "TemplateAssertionError", "shout"),
    (GOOD + "\n{{ nothing.content }}", "UndefinedError", "line 2"),
    ("{{ messages[7].content }}", "UndefinedError", "line 1"),
    ("{{ messages[0].content + 1 }}", "TypeError", ""),
    ("{{ 1 // 0 }}", "ZeroDivisionError", ""),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError", ""),
    ("{% include 'other.jinja' %}", "TypeError", ""),
    ("{% for a in range(10 ** 9) %}x{% endfor %}", "OverflowError", ""),
    ("{{ messages.__class__.__base__.__subclasses__() }}", "SecurityError", ""),
    ("   ", "leaves out the prompt", ""),
    ("{# nothing #}", "leaves out the prompt", "no text"),
    ("{{ mesages }}", "leaves out the prompt", "no text"),
    ("{% if messages | length > 1 %}" + GOOD + "{% endif %}", "leaves out the prompt", "no text"),
    ("{{ messages[0].content }}", "leaves out the response", ""),
    ("{{ messages | map(attribute='content') }}", "writes an object", "generator object"),
    ("{{ 'x' * 3000000 }}" + GOOD, "far more", "3,000,0"),
    ("{% for a in range(99999) %}" + "x" * 40 + "{% endfor %}" + GOOD, "far more", "3,999,9"),
    (GOOD.replace("{{ turn.content }}", "{{ turn.content }}{{ loop.length }}"), "differently", ""),
    ({"tool_use": GOOD}, "fails: ValueError", "no default"),
    (7, "fails|no text", "7|int"),
    (GOOD + "{{ strftime_now('%d %B %Y') }}", "date", "line 1: strftime_now"),
    (GOOD + "\n{% set day = strftime_now('%d') %}", "date", "line 2: strftime_now"),
    ("{% set day = strftime_now %}{{ day(format='%Y') }}" + GOOD, "date", "strftime_now"),
    ("{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + GOOD, "date", "strftime_now"),
    (GOOD + "{{ ['Hello', 'Hi'] | random }}", "random", "line 1: random"),
    (GOOD + "{{ [[1, 2]] | map('random') | first }}", "random", "random"),
    (GOOD + "{{ lipsum(1) }}", "random", "lipsum"),
]


@pytest.mark.parametrize(("template", "message", "found"), BROKEN)
def test_a_template_that_cannot_be_relied_on(
    load: Loader, tokenizer: PreTrainedTokenizerFast, template: object, message: str, found: str
) -> None:
    """Whatever a template does wrong, the data entry is named, with what was found and what to do."""
    with pytest.raises(DataError, match=message) as refused:
        texts(load, tokenizer, template)
    error = refused.value
    assert (error.where, error.exit_code) == ("data.corpus.chat", EXIT_DATA)
    assert any(each in str(error.found) for each in found.split("|"))
    assert error.todo or "no text" in error.message


@pytest.mark.parametrize(
    "template",
    [
        GOOD,
        "\n  {% if true %}\n" + GOOD + "\n  {% endif %}",
        "{% if tools %}{{ strftime_now('%Y') }}{% endif %}" + GOOD,
        "a date | random text{# {{ lipsum() }} #}" + GOOD,
        "{% set strftime_now = 'x' %}{{ strftime_now }}" + GOOD,
        "{% set random = '|' %}{{ random }}" + GOOD,
        "{% generation %}" + GOOD + "{% endgeneration %}",
        {"default": GOOD, "tool_use": "{% for %}"},
        GOOD.replace("turn.content", "turn.content | trim | upper"),
        "x" * 20_000 + GOOD,
    ],
)
def test_a_good_template_writes_what_transformers_writes(
    load: Loader, tokenizer: PreTrainedTokenizerFast, template: object
) -> None:
    """The guard against the clock changes no character."""
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": " a b"}, {"role": "assistant", "content": "c d "}]
    start, rest = chat.write_turns(tokenizer, [" a b"], ["c d "], str)
    chat.check_chat_template(tokenizer, "here")
    assert start == [tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)]
    assert [a + b for a, b in zip(start, rest, strict=True)] == [tokenizer.apply_chat_template(turns, tokenize=False)]


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("{{ raise_exception('no numbers') }}", "refuses the turns"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ strftime_now('%Y') }}", "date"),
        ("{% for a in range(99999) %}{{ 'x' * 100 }}{% endfor %}", "far more"),
        ("{{ messages | length }}", "differently"),
    ],
)
def test_a_template_that_fails_on_some_rows_only(
    load: Loader, tokenizer: PreTrainedTokenizerFast, condition: str, message: str
) -> None:
    """The row is named."""
    template = "{% if '7' in messages[0].content %}" + condition + "{% endif %}" + GOOD
    with pytest.raises(DataError, match=message) as refused:
        texts(load, tokenizer, template, question=["the teacher", "a 7"])
    assert "row 2" in refused.value.where
    assert len(texts(load, tokenizer, template)) == 2


def test_a_template_that_never_ends_is_stopped(
    load: Loader, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread ends too: nothing goes on computing."""
    monkeypatch.setattr(chat, "_SECONDS", 0.3)
    with pytest.raises(DataError, match="does not come to an end") as refused:
        texts(load, tokenizer, ENDLESS + GOOD)
    assert refused.value.where == "data.corpus.chat"
    deadline = time.monotonic() + 60
    while any(thread.name == "chat template" for thread in chat.threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def written(tmp_path: Path, trained: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Template and prompts -> a run that fine-tunes on 100 turns of a chat with the tokenizer of a folder."""

    def write(template: str, prompts: list[str]) -> Path:
        trained.save_pretrained(tmp_path / "chatty")
        (tmp_path / "chatty" / "chat_template.jinja").write_text(template)
        rows = [json.dumps({"q": prompt, "a": "yes"}) for prompt in prompts]
        (tmp_path / "qa.jsonl").write_text("\n".join(rows))
        (tmp_path / "few.jsonl").write_text("\n".join(rows[:2]))
        student = {"architecture": "llama", "layers": 1, "width": 16, "heads": 2}
        values = {
            "name": "chatty",
            "output": str(tmp_path / "runs"),
            "tokenizer": {"path": "chatty"},
            "engine": {"kind": "torch", "device": "cpu", "precision": "fp32"},
            "data": {
                "text": {
                    "source": "files",
                    "files": {"train": "few.jsonl", "test": "qa.jsonl"},
                    "prompt": "q",
                    "text": "a",
                    "chat": True,
                    "max_length": 64,
                }
            },
            "stages": {"s": {"kind": "finetune", "student": student, "steps": 1, "batch": {"sequences": 2}}},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(values))
        return tmp_path / "run.yaml"

    return write


def test_the_plan_looks_at_every_row(written: Callable[..., Path], tmp_path: Path) -> None:
    """Not the first rows alone, not the train split alone; nothing is on disk when it fails."""
    template = "{% if '77' in messages[0].content %}{{ raise_exception('no') }}{% endif %}" + GOOD
    with pytest.raises(DataError, match="refuses the turns") as refused:
        mtkd.plan(load_config(written(template, [f"what is {n}" for n in range(100)])))
    assert "qa.jsonl, row 78 (line 78)" in refused.value.where
    assert not (tmp_path / "runs").exists()
    assert mtkd.plan(load_config(written(template, [f"what is {n}" for n in range(77)]))).data


def test_a_template_that_is_not_used_may_be_broken(written: Callable[..., Path]) -> None:
    """Templates of tokenizers whose turns are not written are text like any other."""
    file = written("{% for %}", ["what is it", "what was it"])
    assert mtkd.plan(load_config(file, ["data.text.chat=false"])).data
    with pytest.raises(DataError, match="TemplateSyntaxError"):
        mtkd.plan(load_config(file))
