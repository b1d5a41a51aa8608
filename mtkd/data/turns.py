"""Chats as people have them: a column of turns, OpenAI's or ShareGPT's, becomes OpenAI's turns, checked one by one.

    OpenAI     [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]   roles as they are
    ShareGPT   [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]            roles by `_NAMES`

A system turn may come first. Then turns of the user and of the assistant alternate; behind a turn of the assistant may
stand results of tools, behind which the assistant goes on. Further keys (`tool_calls`, `name`, `reasoning_content`)
reach the chat template as they are; `weight: 0` (OpenAI's) of an assistant's turn says that it is not to be learned.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from mtkd.data.files import require_column, values_of
from mtkd.errors import DataError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig
    from mtkd.data.files import Origin

Turn = dict[str, Any]
"""`role` and `content`, and what else the template reads; no key is null."""

ROLES = ("system", "user", "assistant", "tool")
_FORMS = {"OpenAI": ("role", "content"), "ShareGPT": ("from", "value")}
_CALL = "function_call"
_NAMES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    _CALL: "assistant",
}
"""ShareGPT's names of roles; `function_call` holds JSON: {"name": ..., "arguments": {...}}, or a list of such."""
_ALLOWED = '[{"role": "user", "content": "..."}, ...] or [{"from": "human", "value": "..."}, ...]'


def written_turns(rows: Dataset, config: DataConfig, origin: Origin) -> list[str]:
    """The turns of every row in OpenAI's form, checked, each row as JSON.

    Text, since a table of objects would give every turn the keys of all others, as nulls.

    Raises:
        DataError: naming the file, row and turn of the first one that is not as the head of this file says.
    """
    assert config.messages is not None
    require_column(rows, config.messages, origin, "messages")
    form, written = "", []
    for row, value in enumerate(values_of(rows, config.messages)):
        try:
            turns = _list_of(value)
            form = form or _form_of(turns[0])
            read = [_turn(turn, form, number) for number, turn in enumerate(turns, start=1)]
            _check_order(read, prompts_only=config.prompts_only)
            if config.mask_history and not learned(read[-1]):
                todo = "drop the row, or mask_history"
                raise _Refused("the last answer alone is learned, and its weight is 0", len(read), read[-1], todo=todo)
        except _Refused as refused:
            place = origin.where(row) + (f", turn {refused.turn}" if refused.turn else "")
            raise DataError(
                refused.message, where=place, found=_short(refused.found), allowed=refused.allowed, todo=refused.todo
            ) from None
        written.append(json.dumps(read, ensure_ascii=False))
    return written


def read_turns(text: str) -> list[Turn]:
    """The turns that `written_turns` wrote."""
    turns: list[Turn] = json.loads(text)
    return turns


def contents(texts: list[str]) -> list[str]:
    """What is said in every turn of rows that `written_turns` wrote, e.g. to train a tokenizer on."""
    return [turn["content"] for text in texts for turn in read_turns(text) if turn["content"]]


class _Refused(Exception):
    """What is wrong with a turn (from 1; 0: with the whole row)."""

    def __init__(self, message: str, turn: int, found: object, allowed: str = "", todo: str = "") -> None:
        self.message, self.turn, self.found = message, turn, found
        self.allowed, self.todo = allowed or None, todo
        super().__init__(message)


def _list_of(value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError):
            raise _Refused("the column of the chat holds no list of turns", 0, value, _ALLOWED) from None
    value = _without_nulls(value)
    if not isinstance(value, list):
        raise _Refused("the column of the chat holds no list of turns", 0, value, _ALLOWED)
    if not value:
        raise _Refused("the chat has no turns", 0, "an empty list", _ALLOWED, "drop the row")
    return value


def _without_nulls(value: Any) -> Any:
    """Parquet and Arrow give every object the keys of all others; null there means that it has none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _form_of(turn: Any) -> str:
    keys = turn if isinstance(turn, dict) else {}
    form = next((form for form, (role, _) in _FORMS.items() if role in keys), "")
    if not form:
        raise _Refused("the turn does not say whose it is", 1, turn, _ALLOWED)
    return form


def _turn(turn: Any, form: str, number: int) -> Turn:
    """A turn in OpenAI's form."""
    who, what = _FORMS[form]
    if not isinstance(turn, dict):
        raise _Refused("a turn is an object", number, turn, _ALLOWED)
    if who not in turn:
        other = next((name for name, (key, _) in _FORMS.items() if key in turn), "")
        message = (
            f"the turn has {other}'s keys, those before it {form}'s" if other else "the turn does not say whose it is"
        )
        raise _Refused(message, number, turn, f"the keys {who} and {what} in every turn of the data")
    role = _role(turn[who], form, number)
    rest = {key: item for key, item in turn.items() if key not in (who, what)}
    if form == "ShareGPT" and turn[who] == _CALL:
        return {"role": role, "content": "", **rest, "tool_calls": _calls(turn.get(what), number)}
    read = {"role": role, "content": _content(turn.get(what, ""), what, number), **rest}
    if not read["content"].strip() and not (role == "assistant" and turn.get("tool_calls")):
        empty = "null or missing" if what not in turn else repr(turn[what])
        raise _Refused(f"the turn of the {role} is empty", number, empty, "text", "drop the turn, or the row")
    if turn.get("weight", 1) not in (0, 1):
        raise _Refused("the weight of a turn says whether it is learned", number, turn["weight"], "0 or 1")
    return read


def _role(name: Any, form: str, number: int) -> str:
    allowed = ROLES if form == "OpenAI" else tuple(_NAMES)
    if not isinstance(name, str) or name not in allowed:
        meant = _NAMES.get(name.strip().lower(), "") if isinstance(name, str) else ""
        todo = f"write '{meant}'" if form == "OpenAI" and meant else nearest(str(name), allowed)
        raise _Refused("unknown role", number, name, ", ".join(allowed), todo or "name the role as one of these")
    return name if form == "OpenAI" else _NAMES[name]


def _content(value: Any, what: str, number: int) -> str:
    if isinstance(value, list):
        todo = f"write the text of its parts as one text into {what}; images and sound are not read"
        raise _Refused(f"{what} is a list of parts", number, value, "text", todo)
    if not isinstance(value, str):
        raise _Refused(f"{what} is no text", number, value, "text")
    return value


def _calls(value: Any, number: int) -> list[dict[str, Any]]:
    """The calls of ShareGPT's `function_call` as OpenAI's `tool_calls`."""
    allowed = '{"name": "...", "arguments": {...}}, or a list of such'
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError):
        raise _Refused("the call of a function is no JSON", number, value, allowed) from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        raise _Refused("the call of a function names no function and arguments", number, value, allowed)
    return [{"type": "function", "function": {key: call[key] for key in ("name", "arguments")}} for call in calls]


def _check_order(turns: list[Turn], *, prompts_only: bool) -> None:
    """Who may speak after whom, and last."""
    structured = any(turn.get("tool_calls") for turn in turns)
    before: Turn = {"role": ""}
    for number, turn in enumerate(turns, start=1):
        called = before["role"] == "assistant" and (bool(before.get("tool_calls")) or not structured)
        fault, todo = _order_fault(turn["role"], before["role"], called=called)
        if fault:
            raise _Refused(fault, number, f"{turn['role']} after {before['role'] or 'nothing'}", todo=todo)
        before = turn
    if prompts_only:
        if before["role"] == "assistant":
            todo = "drop the turn, or prompts_only"
            raise _Refused("the chat ends with an answer, and prompts_only asks for one", len(turns), before, todo=todo)
        return
    if before["role"] != "assistant":
        some = any(turn["role"] == "assistant" for turn in turns)
        fault = "the chat ends without an answer" if some else "the assistant has no turn"
        todo = f"drop the {'turn' if some else 'row'}, or set prompts_only: true for prompts that models answer"
        raise _Refused(fault, len(turns), f"{before['role']}: {before['content']}", "a turn of the assistant", todo)
    if not any(learned(turn) for turn in turns):
        raise _Refused("no turn is learned", 0, "weight 0 in every turn of the assistant", todo="drop the row")


def _order_fault(role: str, last: str, *, called: bool) -> tuple[str, str]:
    """What is wrong with a turn behind another one, and what to do; "" twice for nothing."""
    if role == "system" and last:
        return "a system turn stands first or not at all", "join it with the first one, or drop it"
    if role == "tool" and last != "tool" and not called:
        return "a tool answers that was not called", "add the assistant's call, or drop the turn"
    if role == "user" and last == "tool":
        return "a tool has answered, and the assistant does not go on", "drop the call and the tool's answer"
    if role == "assistant" and last in ("", "system"):
        return "the assistant speaks first", "begin with a turn of the user"
    if role == last and role in ("user", "assistant"):
        return f"two turns of the {role} in a row", "join them"
    return "", ""


def learned(turn: Turn) -> bool:
    """Whether a turn is the assistant's, and to be predicted."""
    return bool(turn["role"] == "assistant" and turn.get("weight", 1) == 1)


def _short(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 160 else f"{text[:160]}..."
