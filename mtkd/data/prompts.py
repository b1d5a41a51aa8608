"""Instruction data: a prompt that is read, and a response that is predicted.

One row is one example, never cut into blocks: the tokenizer's beginning token, the prompt, the response, the end token.
Prompt and response are tokenised apart, so that the response's first token does not depend on where the prompt ends.
With a chat template the turns are its own, beginning and end tokens included. Targets begin with the response's first
token, which the last prompt position predicts; which tokens those are is a matter of their place, not of their id.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import prompt_parts
from mtkd.data.batch import NO_LABEL
from mtkd.data.chat import write_openings, write_turns
from mtkd.data.collate import collate_tokens
from mtkd.data.encode import described, pad_id, texts_of, tokenize
from mtkd.data.files import read_texts
from mtkd.data.marks import without_marks
from mtkd.data.progress import counted
from mtkd.data.split import Split
from mtkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig
    from mtkd.data.files import Origin
    from mtkd.data.split import PrepareRequest


class PromptedExamples:
    """Whole rows; position l predicts the next token from the last prompt token on.

    Args:
        tokens: all examples one after another, a target more than inputs each.
        starts: where each begins in `tokens`, [examples]. lengths: its inputs, [examples].
        prompts: its tokens before the (last) response, at least one, [examples]. Of an example without a response it
            is `lengths`, and NO_LABEL stands in `tokens` for what would follow.
        asked: which of `tokens` are predicted, bool; None: those after the prompts.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        starts: np.ndarray,
        lengths: np.ndarray,
        prompts: np.ndarray,
        asked: np.ndarray | None = None,
    ) -> None:
        self._tokens, self._starts, self.lengths, self._prompts = tokens, starts, lengths, prompts
        self._asked = asked

    @classmethod
    def of(
        cls, examples: Sequence[np.ndarray], prompts: Sequence[int], asked: Sequence[np.ndarray] | None = None
    ) -> PromptedExamples:
        """From the tokens of each example, its prompt's length, and which of its tokens are predicted."""
        sizes = np.array([len(tokens) for tokens in examples], np.int64)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        every = None if asked is None else np.concatenate(asked)
        return cls(np.concatenate(examples), starts, sizes - 1, np.array(prompts, np.int64), every)

    @property
    def prompts(self) -> np.ndarray:
        """Tokens of each example that are read before its (last) response is written, [examples] int64."""
        return self._prompts

    def prompt(self, index: int) -> np.ndarray:
        """The tokens of an example's prompt."""
        start = int(self._starts[index])
        return self._tokens[start : start + int(self._prompts[index])]

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Inputs [L] and the response tokens that follow them [L], NO_LABEL before."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        targets = self._tokens[start + 1 : start + length + 1].astype(np.int64)
        if self._asked is None:
            targets[: int(self._prompts[index]) - 1] = NO_LABEL
        else:
            targets[~self._asked[start + 1 : start + length + 1]] = NO_LABEL
        return self._tokens[start : start + length], targets, None


def prepare_prompted(request: PrepareRequest) -> Split:
    """Prompt and response per row; the end of a response that is too long is cut, and its end token with it.

    A row whose prompt leaves no room for a part of the response is left out. Bytes are those of the predicted response.

    Raises:
        DataError: no row is left, or a chat template that is not there or cannot be split into turns.
    """
    config, tokenizer = request.config, request.tokenizer
    if config.prompts_only:
        return _prompts_alone(request)
    responses, rows = texts_of(request)
    pairs = _encoded(request, *_written(request, responses, rows))
    flat: list[np.ndarray] = []
    used: list[int] = []
    before: list[int] = []
    scored = np.zeros(len(rows), np.int64)
    num_cut = 0
    for number, (prompt, response) in enumerate(pairs):
        start = max(1, len(prompt))  # without a prompt and a beginning token the first one cannot be predicted
        document = np.array([*prompt, *response], np.int32)[: config.max_length + 1]
        if len(document) <= start:
            continue
        cut = len(document) < len(prompt) + len(response)
        part = cut or start > len(prompt)
        text = str(tokenizer.decode(document[start:], skip_special_tokens=True)) if part else responses[number]
        if not text:
            continue
        num_cut += cut
        scored[len(used)] = len(text.encode())
        flat.append(document)
        before.append(start)
        used.append(number)
    check_room(request, len(rows), len(used))
    examples = PromptedExamples.of(flat, before)
    note = cut_note(request, len(rows), len(used), num_cut)
    return prompted_split(request, examples, rows[used], scored[: len(used)], note)


def prompted_split(
    request: PrepareRequest, examples: PromptedExamples, rows: np.ndarray, scored: np.ndarray, note: str
) -> Split:
    """Whole rows as a split.

    Args:
        rows: of each example. scored: UTF-8 bytes of its responses. note: of `cut_note`.
    """
    documents = described(request, rows, np.arange(len(rows)), scored)
    collate, pad = partial(collate_tokens, examples), pad_id(request.tokenizer)
    return Split(collate, examples.lengths, documents, pad_id=pad, note=note, prompted=examples)


def prompts_split(request: PrepareRequest, prompts: Iterable[Sequence[int]], rows: np.ndarray) -> Split:
    """Prompts that nothing answers: no position has a target. One that is longer than `max_length` is left out.

    Args:
        prompts: ids of each. rows: of each.
    Raises:
        DataError: none is left.
    """
    most = request.config.max_length
    every = [np.array([*ids, NO_LABEL], np.int32) for ids in prompts]
    used = [number for number, tokens in enumerate(every) if 1 < len(tokens) <= most + 1]
    check_room(request, len(every), len(used))
    kept = [every[number] for number in used]
    examples = PromptedExamples.of(kept, [len(tokens) - 1 for tokens in kept])
    note = cut_note(request, len(every), len(used), 0)
    return prompted_split(request, examples, rows[used], np.zeros(len(used), np.int64), note)


def _prompts_alone(request: PrepareRequest) -> Split:
    """A prompt per row, or the user's turn with the opening of the assistant's; blank ones are left out."""
    before, rows = _openings(request)
    return prompts_split(request, (prompt for prompt, _ in _encoded(request, before, [""] * len(rows))), rows)


def _openings(request: PrepareRequest) -> tuple[list[str], np.ndarray]:
    """The text of each prompt that is not blank, and its row."""
    assert request.config.prompt is not None
    every = prompt_texts(request.rows, request.config, request.origin)
    rows = np.array([row for row, text in enumerate(every) if text.strip()], np.int64)
    if not len(rows):
        raise DataError("all prompts are blank", where=request.origin.name, found=f"{len(every)} blank rows")
    return list(_written(request, [""] * len(rows), rows)[0]), rows


def prompt_texts(rows: Dataset, config: DataConfig, origin: Origin) -> list[str]:
    """The prompt of every row: a column's text, or the template with the columns' texts in it.

    Of a list of templates each that has a text stands on lines of its own. The last one's line ends too, where no chat
    template parts prompt and response.

    Raises:
        DataError: a column that does not exist or holds no text.
    """
    columns = {name: read_texts(rows, name, origin, "prompt") for name in config.prompt_columns}

    def filled(line: str, row: int) -> str:
        parts = prompt_parts(line)
        texts = [columns[name][row] for _, name in parts if name is not None]
        if not isinstance(config.prompt, str) and not any(text.strip() for text in texts):
            return ""
        return "".join(text + (columns[name][row] if name is not None else "") for text, name in parts)

    if isinstance(config.prompt, str):
        return [filled(config.prompt, row) for row in range(len(rows))]
    last = "" if config.chat else "\n"
    lines = ([filled(line, row) for line in config.prompt_lines] for row in range(len(rows)))
    joined = ["\n".join(filter(None, each)) for each in lines]
    return [text + last if text else "" for text in joined]


def written_texts(request: PrepareRequest) -> list[str]:
    """Everything that is tokenised of a split with prompts: prompts and responses, or the turns of the template.

    Raises:
        DataError: as `prepare_prompted`.
    """
    if request.config.prompts_only:
        return _openings(request)[0]
    before, after = _written(request, *texts_of(request))
    return [*before, *after]


def _written(
    request: PrepareRequest, responses: Sequence[str], rows: np.ndarray
) -> tuple[Sequence[str], Sequence[str]]:
    """The text of each row before the first token that is predicted, and that after it."""
    config = request.config
    assert config.prompt is not None
    every = without_marks(request, prompt_texts(request.rows, config, request.origin), end=False)
    prompts = [every[row] for row in rows]

    def place(number: int) -> str:
        return request.origin.where(int(rows[number]))

    if not config.chat:
        return prompts, responses
    if config.prompts_only:
        return write_openings(request.tokenizer, [[{"role": "user", "content": p}] for p in prompts], place), responses
    return write_turns(request.tokenizer, prompts, responses, place)


def _encoded(
    request: PrepareRequest, before: Sequence[str], after: Sequence[str]
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of both parts, with beginning and end tokens where no template writes them."""
    tokenizer = request.tokenizer
    around = not request.config.chat
    first = [tokenizer.bos_token_id] if around and tokenizer.bos_token_id is not None else []
    last = [tokenizer.eos_token_id] if around and tokenizer.eos_token_id is not None else []
    prompts = counted(tokenize(tokenizer, before), f"tokenizing {request.origin.name} ({request.split})", len(before))
    for prompt, response in zip(prompts, tokenize(tokenizer, after), strict=True):
        yield [*first, *prompt], [*response, *last]


def check_room(request: PrepareRequest, num_rows: int, num_kept: int) -> None:
    """Refuse a split none of whose prompts fits into `max_length`."""
    if not num_kept:
        raise DataError(
            "no prompt leaves room for a response token",
            where=request.origin.name,
            found=f"{num_rows} rows, max_length {request.config.max_length}",
            todo="set a larger data.NAME.max_length",
        )


def cut_note(request: PrepareRequest, num_rows: int, num_kept: int, num_cut: int) -> str:
    """What was lost to `max_length`; "" for nothing."""
    lost = num_rows - num_kept
    why = "is too long" if request.config.prompts_only else "leaves no response to predict"
    parts = [f"{lost:,} of {num_rows:,} rows left out: the prompt {why}"] if lost else []
    parts += [f"{num_cut:,} of {num_kept:,} responses cut at the end"] if num_cut else []
    if not parts:
        return ""
    return f"{request.origin.name} ({request.split}), max_length {request.config.max_length}: " + "; ".join(parts)
