"""Turns of a chat as the tokenizer's own template writes them; a template is a stranger's code and may do anything.

It may be broken, refuse some turns, never end, leave out what it was given, or write the date. Each is an error of the
data entry, found while the run is planned. What a template writes is to depend on the turns alone: the clock and the
random functions of jinja are out of its reach.
"""

from __future__ import annotations

import ctypes
import re
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mtkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SECONDS = 10.0
"""For `_AT_ONCE` rows, which take some 20 ms: only a template that never ends is as slow."""
_AT_ONCE = 256
_MOST_ADDED = 1_000_000
"""Characters around a turn; the longest published templates write about ten thousand."""

_NOT_ALONE = "mtkd: not a function of the turns"
# Stand before the template, whose first line stays the beginning of a line: jinja drops the line end after a block.
_GUARD = "".join(
    f"{{%- macro {name}() -%}}{{{{ raise_exception('{_NOT_ALONE}: {name}') ~ varargs ~ kwargs }}}}{{%- endmacro -%}}"
    for name in ("strftime_now", "lipsum")
)
_GUARD = _GUARD.removesuffix("-%}") + "%}\n"
_PLAIN = (
    "set another one (tokenizer.chat_template, such as chatml); data with `prompt` can do without: chat: false, and in "
    "`prompt` what the model expects around it"
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]{6,}>")  # Python's words for an object that is no text

Turns = list[dict[str, Any]]


class _TooSlow(Exception):
    """Raised in a thread whose time is up."""


def check_chat_template(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse turns of a chat where nothing says how they are written, or what does cannot be relied on.

    Args:
        where: `chat` of the data entry.
    Raises:
        DataError: there is no chat template (the run trains its tokenizer, or it came without one); it fails on a
            simple question and answer, leaves out one of them, or writes something else each time.
    """
    if not tokenizer.chat_template:
        raise DataError(
            "the tokenizer has no chat template",
            where=where,
            found="chat: true" if where.endswith(".chat") else "turns of a chat",
            todo=_PLAIN.replace("another one", "one"),
        )
    _check_chance(tokenizer, where)
    # Letters, since templates may trim; each text is one that the other pairs lack.
    pairs = [("ab", "cd"), ("ef", "cd"), ("ab", "gh")]
    opened, added = write_turns(tokenizer, [p for p, _ in pairs], [r for _, r in pairs], lambda _: where)
    for text in (*opened, *added):
        if address := _ADDRESS.search(text):
            raise _useless(tokenizer, where, "writes an object, not its text", text[: address.end()][-160:])
    if opened[0] == opened[1]:
        raise _useless(tokenizer, where, "leaves out the prompt", opened[0] or "no text")
    if added[0] == added[2]:
        raise _useless(tokenizer, where, "leaves out the response", opened[0] + added[0])


def write_turns(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], responses: Sequence[str], place: Callable[[int], str]
) -> tuple[list[str], list[str]]:
    """Per row a user's turn with the opening of the assistant's, and what the template adds with the response.

    Args:
        place: number of a row here -> where it stands, for messages.
    Raises:
        DataError: the template fails on a row, does not come to an end, or cannot be split into turns.
    """
    source = template_source(tokenizer, place)
    opened: list[str] = []
    added: list[str] = []

    def write(row: int) -> None:
        start, rest = _write(tokenizer, source, prompts[row], responses[row], place(row))
        opened.append(start)
        added.append(rest)

    write_rows(tokenizer, len(prompts), write, place)
    return opened, added


def write_openings(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Turns], place: Callable[[int], str]
) -> list[str]:
    """Per chat its turns with the opening of the assistant's next one.

    Args:
        place: number of a chat -> where it stands, for messages.
    Raises:
        DataError: the template fails on a chat, or does not come to an end.
    """
    source = template_source(tokenizer, place)
    opened: list[str] = []

    def write(row: int) -> None:
        opened.append(_render(tokenizer, source, chats[row], place(row), opening=True))

    write_rows(tokenizer, len(chats), write, place)
    return opened


def write_rows(
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    write: Callable[[int], None],
    place: Callable[[int], str],
    at_once: int = _AT_ONCE,
) -> None:
    """Call a function that renders row after row, and stop it where a template does not come to an end.

    Args:
        at_once: rows that together have `_SECONDS`.
    """
    done = 0

    def part() -> None:
        nonlocal done
        for _ in range(min(at_once, count - done)):
            write(done)
            done += 1

    while done < count:
        try:
            _in_time(part)
        except _TooSlow:
            detail = f"{_name(tokenizer)}: longer than {_SECONDS:g} s"
            raise DataError(
                "the chat template does not come to an end", where=place(done), found=detail, todo=_PLAIN
            ) from None


def template_source(tokenizer: PreTrainedTokenizerBase, place: Callable[[int], str]) -> str:
    """The template that writes turns, behind its guard."""
    try:
        template: object = tokenizer.get_chat_template()
    except Exception as error:  # several templates, none of them the default
        raise _failed(tokenizer, error, place(0)) from error
    if not isinstance(template, str):
        raise DataError("the chat template is no text", where=place(0), found=f"{_name(tokenizer)}: {template!r}"[:160])
    return _GUARD + template


def _write(tokenizer: PreTrainedTokenizerBase, source: str, prompt: str, response: str, where: str) -> tuple[str, str]:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    start = _render(tokenizer, source, turns[:1], where, opening=True)
    whole = _render(tokenizer, source, turns, where)
    if not whole.startswith(start):
        raise DataError(
            "the chat template writes the prompt differently when a response follows",
            where=where,
            found=whole[:160],
            allowed=start[:160],
            todo=_PLAIN,
        )
    return start, whole[len(start) :]


def _render(tokenizer: PreTrainedTokenizerBase, source: str, turns: Turns, where: str, *, opening: bool = False) -> str:
    return render(tokenizer, source, turns, where, opening=opening)[0]


def render(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    turns: Turns,
    where: str,
    *,
    opening: bool = False,
    marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    """The text of turns, and the characters (from, to) that the template marks as the assistant's.

    Args:
        source: of `template_source`.
        opening: whether the assistant's turn is begun behind them.
        marks: whether `{% generation %}` is looked at; else there are none.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        # what `apply_chat_template` calls, which keeps the marks for itself
        rendered: Any = render_jinja_template(
            [turns],
            chat_template=source,
            return_assistant_tokens_mask=marks,
            add_generation_prompt=opening,
            **tokenizer.special_tokens_map,  # type: ignore[arg-type]
        )
        text, found = str(rendered[0][0]), rendered[1]
    except _TooSlow:
        raise
    except Exception as error:  # jinja's own, and all that Python raises for what a template does
        raise _failed(tokenizer, error, where) from error
    length = sum(map(_length, turns))
    if len(text) > _MOST_ADDED + 10 * length:
        raise DataError(
            "the chat template writes far more than it is given",
            where=where,
            found=f"{_name(tokenizer)}: {len(text):,} characters for turns of {length:,}",
            todo=_PLAIN,
        )
    return text, [*found[0]] if marks else []


def _length(turn: dict[str, Any]) -> int:
    """Characters that a turn gives to the template."""
    return sum(len(value if isinstance(value, str) else str(value)) for value in turn.values())


def _in_time(work: Callable[[], None]) -> None:
    """Do something in a thread that is stopped when its time is up; what it raises is raised here.

    A signal would do for the main thread alone, and pytest and users have uses of their own for it.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # raised below, in the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="chat template", daemon=True)
    thread.start()
    thread.join(_SECONDS)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_TooSlow))
        raise _TooSlow
    if raised:
        raise raised[0]


def _check_chance(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    """Refuse jinja's filter `random`, which no name can hide from a template."""
    from jinja2 import Environment, TemplateError

    source = template_source(tokenizer, lambda _: where).removeprefix(_GUARD)
    try:
        tokens = [(line, text) for line, kind, text in Environment().lex(source) if kind != "whitespace"]
    except TemplateError as error:
        raise _failed(tokenizer, error, where, guarded=False) from error
    for (_, before), (line, text) in pairwise(tokens):
        if (before, text) == ("|", "random") or (before == "(" and text.strip("'\"") == "random"):
            raise _not_alone(tokenizer, "random", line, where)


def _failed(tokenizer: PreTrainedTokenizerBase, error: Exception, where: str, *, guarded: bool = True) -> DataError:
    """What a template raised as an error of the entry or row, with the template's line."""
    line, reason = _line(error) - guarded, str(error).strip().splitlines() or [""]
    if reason[0].startswith(_NOT_ALONE):
        return _not_alone(tokenizer, reason[0].rpartition(" ")[2], line, where)
    kind = type(error).__name__
    refused = kind == "TemplateError"  # `raise_exception` of the template itself
    message = "the chat template refuses the turns" if refused else f"the chat template fails: {kind}"
    at = f", line {line}" if line > 0 else ""
    todo = f"correct the template (chat_template of the tokenizer), or {_PLAIN}"
    return DataError(message, where=where, found=f"{_name(tokenizer)}{at}: {reason[0][:300]}", todo=todo)


def _line(error: Exception) -> int:
    """Line of the guarded template, from 1; 0 where it is not known."""
    if isinstance(number := getattr(error, "lineno", None), int):
        return number
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
    of_template = [frame.lineno or 0 for frame in frames if (frame.lineno or 0) > 1]  # line 1 is the guard's
    return of_template[-1] if of_template else 0


def _not_alone(tokenizer: PreTrainedTokenizerBase, name: str, line: int, where: str) -> DataError:
    at = f", line {line}" if line > 0 else ""
    return DataError(
        "the chat template writes the date, the time or something random: the same rows would be other texts",
        where=where,
        found=f"{_name(tokenizer)}{at}: {name}",
        allowed="a template whose text depends on the turns alone",
        todo=f"write a fixed text in its place, in a copy of the tokenizer's folder (tokenizer.path), or {_PLAIN}",
    )


def _useless(tokenizer: PreTrainedTokenizerBase, where: str, what: str, text: str) -> DataError:
    shown = f"{_name(tokenizer)}: {text[:160]!r}"
    return DataError(f"the chat template {what}", where=where, found=shown, todo=_PLAIN)


def _name(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"chat template of {tokenizer.name_or_path}" if tokenizer.name_or_path else "chat template"
