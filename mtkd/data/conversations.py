"""Chats of several turns as examples: the chat template writes all turns, and the assistant's are predicted.

Where they stand is what the template marks with `{% generation %}`. A template without marks is applied to growing
prefixes of the turns: what comes with an assistant's turn, behind its opening, is the answer. That holds only if what
was written before stays as it is when a turn follows, in characters and in tokens; it is checked, turn by turn.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.chat import Turns, render, template_source, write_openings, write_rows
from mtkd.data.encode import column_of, tokenize
from mtkd.data.marks import without_marks
from mtkd.data.progress import counted
from mtkd.data.prompts import PromptedExamples, check_room, cut_note, prompted_split, prompts_split
from mtkd.data.turns import learned, read_turns
from mtkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.split import PrepareRequest, Split

_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_AT_ONCE = 8
"""Chats that are rendered in one time limit; a template is applied twice per answer."""
_ENCODED_AT_ONCE = 128
"""Chats; each is tokenised once, and once more up to every border of an answer."""
_TODO = (
    "set mask_history: true (the last answer alone is predicted), or give the run a template that marks the answers "
    "with {% generation %}: tokenizer.chat_template"
)


@dataclass(frozen=True)
class WrittenChat:
    """A chat as its template writes it.

    Attributes:
        answers: per turn that is predicted its number (from 1), first character and the one behind its last.
        said: UTF-8 bytes of what these turns say; -1 where the template writes calls of tools into them.
    """

    text: str
    answers: tuple[tuple[int, int, int], ...]
    said: int

    @property
    def borders(self) -> list[int]:
        """Characters at which a token must begin: 0 and the end of the text are no borders."""
        every = {border for _, start, end in self.answers for border in (start, end)}
        return sorted(every - {0, len(self.text)})


def prepare_chats(request: PrepareRequest) -> Split:
    """A chat per row; what lies behind `max_length` is cut, and a chat without an answer before it is left out.

    The last answer that is there counts as the response of the example, all before it as its prompt. An answer ends
    with the special token that the template writes behind it; a line end behind that is not predicted.

    Raises:
        DataError: no row is left, or the template cannot be split into turns; naming row and turn.
    """
    config, tokenizer = request.config, request.tokenizer
    chats = _chats(request)
    if config.prompts_only:
        opened = write_openings(tokenizer, chats, request.origin.where)
        return prompts_split(request, tokenize(tokenizer, opened), np.arange(len(chats)))
    written = write_chats(tokenizer, chats, request.origin.where, last=config.mask_history)
    ends = _ends(tokenizer)
    flat: list[np.ndarray] = []
    asked: list[np.ndarray] = []
    used: list[int] = []
    prompts: list[int] = []
    scored: list[int] = []
    num_cut = 0
    encoded = encode_chats(tokenizer, written, request.origin.where)
    for row, (ids, answers) in enumerate(counted(encoded, f"tokenizing {request.origin.name}", len(written))):
        tokens = np.array(ids, np.int32)[: config.max_length + 1]
        spans = [(max(1, a), min(_end(tokenizer, ids, a, b, ends), len(tokens))) for a, b in answers]
        spans = [(a, b) for a, b in spans if a < b]
        if not spans:
            continue
        mask = np.zeros(len(tokens), bool)
        for a, b in spans:
            mask[a:b] = True
        cut = len(tokens) < len(ids) and answers[-1][1] > len(tokens)
        num_cut += cut
        said = written[row].said
        if cut or said < 0:
            text = [str(tokenizer.decode(tokens[a:b], skip_special_tokens=True)) for a, b in spans]
            said = sum(len(each.encode()) for each in text)
        flat.append(tokens[: spans[-1][1]])  # behind the last answer nothing is asked
        asked.append(mask[: spans[-1][1]])
        prompts.append(spans[-1][0])
        scored.append(said)
        used.append(row)
    check_room(request, len(written), len(used))
    examples = PromptedExamples.of(flat, prompts, asked)
    note = cut_note(request, len(written), len(used), num_cut)
    return prompted_split(request, examples, np.array(used, np.int64), np.array(scored, np.int64), note)


def chat_texts(request: PrepareRequest) -> list[str]:
    """Everything that is tokenised of a split with chats; raises as `prepare_chats`."""
    chats, place = _chats(request), request.origin.where
    if request.config.prompts_only:
        return write_openings(request.tokenizer, chats, place)
    return [chat.text for chat in write_chats(request.tokenizer, chats, place, last=request.config.mask_history)]


def write_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[Turns], place: Callable[[int], str], *, last: bool = False
) -> list[WrittenChat]:
    """What the chat template makes of chats, and where it puts the answers.

    Args:
        chats: turns of OpenAI's form, ending with the assistant's.
        place: number of a chat -> where it stands, for messages.
        last: whether the last turn alone is predicted.
    Raises:
        DataError: the template fails, or writes a turn otherwise when others follow; naming row and turn.
    """
    source = template_source(tokenizer, place)
    marked = _MARK.search(source) is not None
    every: list[WrittenChat] = []

    def write(row: int) -> None:
        turns = chats[row]
        numbers = [number for number, turn in enumerate(turns) if turn["role"] == "assistant"]
        text, marks = render(tokenizer, source, turns, place(row), marks=marked)
        if marked:
            spans = _marked(text, marks, turns, numbers, place(row))
        else:
            spans = {}
        wanted = [number for number in (numbers[-1:] if last else numbers) if learned(turns[number])]
        if not marked:
            spans = {n: _between(tokenizer, source, turns, n, text, place(row)) for n in wanted}
        calls = any(turns[number].get("tool_calls") for number in wanted)
        said = -1 if calls else sum(len(turns[number]["content"].encode()) for number in wanted)
        every.append(WrittenChat(text, tuple((number + 1, *spans[number]) for number in wanted), said))

    write_rows(tokenizer, len(chats), write, place, _AT_ONCE)
    return every


def _marked(
    text: str, marks: Sequence[tuple[int, int]], turns: Turns, numbers: Sequence[int], where: str
) -> dict[int, tuple[int, int]]:
    """The marked characters of each of the assistant's turns."""
    if len(marks) != len(numbers) or any(start >= end for start, end in marks):
        raise DataError(
            "the chat template does not mark every turn of the assistant once",
            where=where,
            found=f"{len(marks)} marks for {len(numbers)} turns",
            allowed="{% generation %}...{% endgeneration %} around each of them",
            todo="correct the template, or take its marks out",
        )
    for number, (start, end) in zip(numbers, marks, strict=True):
        said = turns[number]["content"].strip()
        if said in text and said not in text[start:end]:  # marks inside of a macro are counted from its own beginning
            raise DataError(
                "the chat template marks another place than the assistant's turn",
                where=f"{where}, turn {number + 1}",
                found=text[start:end][:160],
                allowed=said[:160],
                todo="take {% generation %} out of the template's macros",
            )
    return dict(zip(numbers, marks, strict=True))


def _between(
    tokenizer: PreTrainedTokenizerBase, source: str, turns: Turns, number: int, text: str, where: str
) -> tuple[int, int]:
    """First character of a turn behind its opening, and the one behind its last, by prefixes of the chat."""
    opened = render(tokenizer, source, turns[:number], where, opening=True)[0]
    closed = text if number + 1 == len(turns) else render(tokenizer, source, turns[: number + 1], where)[0]
    for prefix, follows in ((opened, f"turn {number + 1} follows"), (closed, f"turn {number + 2} follows")):
        if not text.startswith(prefix):
            same = next(i for i, (a, b) in enumerate(zip(prefix, f"{text}\0", strict=False)) if a != b)
            around = slice(max(0, same - 40), same + 80)
            raise DataError(
                f"the chat template writes a turn differently when {follows}",
                where=f"{where}, turn {number + 1}",
                found=f"{text[around]!r}",
                allowed=f"{prefix[around]!r}",
                todo=_TODO,
            )
    return len(opened), len(closed)


def encode_chats(
    tokenizer: PreTrainedTokenizerBase, chats: Sequence[WrittenChat], place: Callable[[int], str]
) -> Iterator[tuple[list[int], list[tuple[int, int]]]]:
    """Ids of each chat, and first and last token + 1 of its answers.

    Raises:
        DataError: the text up to an answer is cut into other tokens than within the chat, so that a model that writes
            would read something else than one that learns; naming row and turn.
    """
    for begin in range(0, len(chats), _ENCODED_AT_ONCE):
        part = chats[begin : begin + _ENCODED_AT_ONCE]
        texts = [text for chat in part for text in (chat.text, *(chat.text[:border] for border in chat.borders))]
        ids = tokenize(tokenizer, texts)
        for number, chat in enumerate(part, start=begin):
            whole = next(ids)
            places = {0: 0, len(chat.text): len(whole)}
            for border in chat.borders:
                before = next(ids)
                if before != whole[: len(before)]:
                    raise _no_border(tokenizer, chat, border, before, whole, place(number))
                places[border] = len(before)
            yield whole, [(places[start], places[end]) for _, start, end in chat.answers]


def _no_border(
    tokenizer: PreTrainedTokenizerBase,
    chat: WrittenChat,
    border: int,
    before: list[int],
    whole: list[int],
    where: str,
) -> DataError:
    turn, start, _ = next(answer for answer in chat.answers if border in answer[1:])
    side = "beginning" if border == start else "end"
    same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(whole))
    shown = tokenizer.convert_ids_to_tokens(whole[same : same + 1]), chat.text[max(0, border - 20) : border + 20]
    return DataError(
        f"no token ends at the {side} of the assistant's turn",
        where=f"{where}, turn {turn}",
        found=f"the token {''.join(map(str, shown[0]))!r} in {shown[1]!r}",
        allowed="a template with special tokens around a turn, and turns without white space around them",
        todo="strip the text of the turn, or set tokenizer.chat_template to another template",
    )


def _chats(request: PrepareRequest) -> list[Turns]:
    """The turns of every row; beginning and end tokens that a text brings along stand in the template already."""
    assert request.config.messages is not None
    chats = [read_turns(text) for text in column_of(request, request.config.messages, "messages")]
    bare = iter(without_marks(request, [turn["content"] for turns in chats for turn in turns]))
    return [[{**turn, "content": next(bare)} for turn in turns] for turns in chats]


def _ends(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that may end a turn: all special ones."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _end(tokenizer: PreTrainedTokenizerBase, ids: list[int], start: int, stop: int, ends: frozenset[int]) -> int:
    """Where an answer stops: behind its last special token, if only white space follows that."""
    last = next((place for place in range(stop - 1, start - 1, -1) if ids[place] in ends), None)
    if last is None or str(tokenizer.decode(ids[last + 1 : stop])).strip():
        return stop
    return last + 1
