"""Turns of chats as people write them: both forms, and every way to be wrong, with file, row and turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_examples import load_raw
from datasets import Dataset

from mtkd.config import DataConfig
from mtkd.data.raw import Raw
from mtkd.data.sources import read_source
from mtkd.data.turns import contents, read_turns
from mtkd.errors import DataError

Write = Callable[..., DataConfig]
GOOD = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def turn(role: str, content: object = "x", **more: object) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def read(write: Write, tmp_path: Path, *rows: object, **fields: object) -> list[list[dict[str, Any]]]:
    lines = "\n".join(json.dumps({"messages": row, "id": n}) for n, row in enumerate(rows))
    config = write("chat.jsonl", lines, messages="messages", task="causal-lm", **fields)
    return [read_turns(text) for text in load_raw(config, tmp_path).texts("train", "messages")]


def test_both_forms_are_the_same_turns(write: Write, tmp_path: Path) -> None:
    assert read(write, tmp_path, GOOD, GOOD) == read(write, tmp_path, SHARED, SHARED) == [GOOD, GOOD]


def test_every_role_of_sharegpt(write: Write, tmp_path: Path) -> None:
    """The names that LLaMA-Factory's and axolotl's data have; a call is OpenAI's `tool_calls`."""
    row = [("system", "Be"), ("human", "1+1"), ("function_call", '{"name": "add", "arguments": {"a": 1}}')]
    row += [("observation", "2"), ("gpt", "Two"), ("user", "More"), ("model", "No"), ("user", "?"), ("chatgpt", "!")]
    [turns] = read(write, tmp_path, [{"from": name, "value": value} for name, value in row])
    roles = ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "user", "assistant"]
    assert [each["role"] for each in turns] == roles
    assert turns[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert [each["content"] for each in turns[3:]] == [value for _, value in row[3:]]


def test_objects_that_are_not_alike_stay_as_they_are(write: Write, tmp_path: Path) -> None:
    """A table would give every turn and argument the keys of all others, and has no place for two types of one."""
    other = {"type": "function", "function": {"name": "say", "arguments": {"a": "text", "b": [1, {"c": None}]}}}
    rows = [
        [turn("user"), turn("assistant", None, tool_calls=[CALL]), turn("tool", "2"), turn("assistant", name="Bo")],
        [turn("user"), turn("assistant", "", tool_calls=[other])],
    ]
    first, second = read(write, tmp_path, *rows)
    assert first[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    assert (first[0], first[3]) == (turn("user"), turn("assistant", name="Bo"))
    assert second[1]["tool_calls"][0]["function"]["arguments"] == {"a": "text", "b": [1, {}]}


def test_json_texts_and_tables_and_saved_sets(write: Write, tmp_path: Path) -> None:
    """A column of JSON in a .csv, and Parquet's columns of objects, whose missing keys are null."""
    field = json.dumps(GOOD).replace('"', '""')
    config = write("chat.csv", f'id,turns\n1,"{field}"\n', messages="turns", task="causal-lm")
    assert read_turns(load_raw(config, tmp_path).texts("train", "turns")[0]) == GOOD
    rows = Dataset.from_dict({"turns": [GOOD, [turn("user"), turn("assistant", name="Bo")]]})
    rows.to_parquet(tmp_path / "chat.parquet")
    rows.save_to_disk(str(tmp_path / "saved"))
    for name in ("chat.parquet", "saved"):
        config = DataConfig(source="files", files={"train": name}, messages="turns")
        texts = load_raw(config, tmp_path).texts("train", "turns")
        assert [read_turns(text) for text in texts] == [GOOD, [turn("user"), turn("assistant", name="Bo")]]


def test_what_a_tokenizer_is_trained_on(write: Write, tmp_path: Path) -> None:
    """What is said, not the JSON around it."""
    config = write("chat.jsonl", json.dumps({"messages": GOOD}), messages="messages")
    assert contents(load_raw(config, tmp_path).texts("train", "messages")) == ["Hi", "Hello"]


BAD: list[tuple[object, int, str, str]] = [
    ("hello", 0, "no list of turns", "hello"),
    (7, 0, "no list of turns", "7"),
    (None, 0, "no list of turns", "null"),
    ({"role": "user"}, 0, "no list of turns", "user"),
    ([], 0, "no turns", "empty list"),
    (["Hi", "Hello"], 1, "is an object", "Hi"),
    ([GOOD[0], None], 2, "is an object", "null"),
    ([{"content": "Hi"}], 1, "does not say whose", "Hi"),
    ([GOOD[0], {"content": "Hi"}], 2, "does not say whose", "Hi"),
    ([GOOD[0], SHARED[1]], 2, "ShareGPT's keys, those before it OpenAI's", "gpt"),
    (SHARED, 1, "ShareGPT's keys, those before it OpenAI's", "human"),
    ([turn("human"), GOOD[1]], 1, "unknown role", "human"),
    ([turn("usr"), GOOD[1]], 1, "unknown role", "usr"),
    ([turn(3), GOOD[1]], 1, "unknown role", "3"),  # type: ignore[arg-type]
    ([turn("user", ""), GOOD[1]], 1, "turn of the user is empty", "''"),
    ([GOOD[0], turn("assistant", " \n")], 2, "turn of the assistant is empty", "' \\n'"),
    ([GOOD[0], turn("assistant", None)], 2, "turn of the assistant is empty", "null"),
    ([GOOD[0], {"role": "assistant"}], 2, "turn of the assistant is empty", "missing"),
    ([turn("system", ""), *GOOD], 1, "turn of the system is empty", "''"),
    ([turn("user", [{"type": "text", "text": "Hi"}]), GOOD[1]], 1, "list of parts", "Hi"),
    ([turn("user", {"text": "Hi"}), GOOD[1]], 1, "no text", "Hi"),
    ([turn("user", 5), GOOD[1]], 1, "no text", "5"),
    ([GOOD[0]], 1, "the assistant has no turn", "user: Hi"),
    ([turn("system"), GOOD[0]], 2, "the assistant has no turn", "user: Hi"),
    ([*GOOD, GOOD[0]], 3, "ends without an answer", "user: Hi"),
    ([*GOOD, GOOD[1]], 3, "two turns of the assistant in a row", "assistant after assistant"),
    ([GOOD[0], *GOOD], 2, "two turns of the user in a row", "user after user"),
    ([GOOD[1], *GOOD], 1, "the assistant speaks first", "after nothing"),
    ([turn("system"), GOOD[1]], 2, "the assistant speaks first", "after system"),
    ([*GOOD, turn("system"), *GOOD], 3, "first or not at all", "system after assistant"),
    ([GOOD[0], turn("tool"), GOOD[1]], 2, "not called", "tool after user"),
    ([turn("tool"), GOOD[1]], 1, "not called", "tool after nothing"),
    (
        [GOOD[0], turn("assistant", "", tool_calls=[CALL]), turn("tool"), GOOD[1], turn("tool"), GOOD[1]],
        5,
        "not called",
        "tool after assistant",
    ),
    ([*GOOD, turn("tool"), *GOOD], 4, "does not go on", "user after tool"),
    ([GOOD[0], turn("assistant", weight=0)], 0, "no turn is learned", "weight 0"),
    ([GOOD[0], turn("assistant", weight=0.5)], 2, "weight of a turn", "0.5"),
]


@pytest.mark.parametrize(("row", "number", "message", "found"), BAD)
def test_what_is_wrong_is_said_with_file_row_and_turn(
    write: Write, tmp_path: Path, row: object, number: int, message: str, found: str
) -> None:
    """Before a model is there: the row is the third of the file, and the turn is counted from 1."""
    with pytest.raises(DataError, match=message) as refused:
        read(write, tmp_path, GOOD, GOOD, row)
    error = refused.value
    place = f"chat.jsonl, row 3 (line 3){f', turn {number}' if number else ''}"
    assert error.where == place
    assert found in str(error.found)
    assert error.todo or error.allowed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([SHARED[0], {"from": "function_call", "value": "add(1)"}], "is no JSON"),
        ([SHARED[0], {"from": "function_call", "value": "{}"}], "names no function"),
        ([SHARED[0], {"from": "function_call", "value": "[]"}], "names no function"),
        ([SHARED[0], {"from": "function_call"}], "names no function"),
        ([SHARED[0], {"from": "GPT", "value": "x"}], "unknown role"),
        ([SHARED[0], {"from": "gpt"}], "is empty"),
        ([SHARED[0], {"from": "gpt", "value": ["x"]}], "list of parts"),
        ([{"from": "tool", "value": "x"}], "not called"),
    ],
)
def test_what_is_wrong_in_sharegpt(write: Write, tmp_path: Path, row: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as refused:
        read(write, tmp_path, SHARED, row)
    assert "row 2" in refused.value.where


def test_a_name_of_another_form_is_translated(write: Write, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown role") as refused:
        read(write, tmp_path, [turn("human"), GOOD[1]])
    assert (refused.value.todo, refused.value.allowed) == ("write 'user'", "system, user, assistant, tool")


def test_a_column_that_is_not_there(write: Write, tmp_path: Path) -> None:
    config = write("chat.jsonl", json.dumps({"conversation": GOOD}), messages="conversations")
    with pytest.raises(DataError, match="no column 'conversations'") as refused:
        load_raw(config, tmp_path)
    assert "did you mean 'conversation'?" in refused.value.todo


def test_prompts_alone_end_with_a_turn_to_answer(write: Write, tmp_path: Path) -> None:
    rows = [[GOOD[0]], [*GOOD, GOOD[0]]]
    assert read(write, tmp_path, *rows, prompts_only=True) == rows
    with pytest.raises(DataError, match="ends with an answer") as refused:
        read(write, tmp_path, [GOOD[0]], GOOD, prompts_only=True)
    assert refused.value.where == "chat.jsonl, row 2 (line 2), turn 2"


def test_the_rows_stay_where_they_were(write: Write, tmp_path: Path) -> None:
    """Other columns and the content's fingerprint are untouched."""
    lines = "\n".join(json.dumps({"messages": GOOD, "id": str(n)}) for n in range(5))
    config = write("chat.jsonl", lines, messages="messages")
    raw: Raw = read_source(config, tmp_path)
    plain: Raw = read_source(write("chat.jsonl", lines), tmp_path)
    assert raw.splits["train"]["id"][:] == plain.splits["train"]["id"][:]
    assert raw.fingerprint == plain.fingerprint


def test_a_last_answer_that_nobody_learns(write: Write, tmp_path: Path) -> None:
    """`mask_history` learns it alone, and its weight takes it out: earlier answers are no reason to keep it."""
    row = [*GOOD, GOOD[0], turn("assistant", weight=0)]
    read(write, tmp_path, row)
    with pytest.raises(DataError, match="its weight is 0") as refused:
        read(write, tmp_path, GOOD, row, mask_history=True)
    assert refused.value.where.endswith("row 2 (line 2), turn 4")
