"""Instruction data: a prompt that is read, and a response that is predicted.

One row is one example, never cut into blocks: the tokenizer's beginning token, the prompt, the response, the end token.
Prompt and response are tokenised apart, so that the response's first token does not depend on where the prompt ends.
With a chat template the turns are its own, beginning and end tokens included. Targets begin with the response's first
token, which the last prompt position predicts; which tokens those are is a matter of their place, not of their id.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import prompt_parts
from mtkd.data.batch import NO_LABEL
from mtkd.data.chat import write_turns
from mtkd.data.collate import collate_tokens
from mtkd.data.encode import described, pad_id, texts_of, tokenize
from mtkd.data.files import read_texts
from mtkd.data.marks import without_marks
from mtkd.data.progress import counted
from mtkd.data.split import Split
from mtkd.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.data.files import Origin
    from mtkd.data.split import PrepareRequest


class PromptedExamples:
    """Whole rows; position l predicts the next token from the last prompt token on.

    Args:
        tokens: all examples one after another, a target more than inputs each.
        starts: where each begins in `tokens`, [examples]. lengths: its inputs, [examples].
        prompts: its tokens before the response, at least one, [examples].
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> None:
        self._tokens, self._starts, self.lengths, self._prompts = tokens, starts, lengths, prompts

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Inputs [L] and the response tokens that follow them [L], NO_LABEL before."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        targets = self._tokens[start + 1 : start + length + 1].astype(np.int64)
        targets[: int(self._prompts[index]) - 1] = NO_LABEL
        return self._tokens[start : start + length], targets, None


def prepare_prompted(request: PrepareRequest) -> Split:
    """Prompt and response per row; the end of a response that is too long is cut, and its end token with it.

    A row whose prompt leaves no room for a part of the response is left out. Bytes are those of the predicted response.

    Raises:
        DataError: no row is left, or a chat template that is not there or cannot be split into turns.
    """
    config, tokenizer = request.config, request.tokenizer
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
    if not used:
        raise DataError(
            "no prompt leaves room for a response token",
            where=request.origin.name,
            found=f"{len(rows)} rows, max_length {config.max_length}",
            todo="set a larger data.NAME.max_length",
        )
    sizes = np.array([len(document) for document in flat], np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    examples = PromptedExamples(np.concatenate(flat), starts, sizes - 1, np.array(before, np.int64))
    documents = described(request, rows[used], np.arange(len(used)), scored[: len(used)])
    note = _note(request, len(rows), len(used), num_cut)
    return Split(partial(collate_tokens, examples), examples.lengths, documents, pad_id=pad_id(tokenizer), note=note)


def prompt_texts(rows: Dataset, prompt: str, origin: Origin) -> list[str]:
    """The prompt of every row: a column's text, or the template with the columns' texts in it.

    Raises:
        DataError: a column that does not exist or holds no text.
    """
    parts = prompt_parts(prompt)
    columns = {name: read_texts(rows, name, origin, "prompt") for _, name in parts if name is not None}
    return ["".join(text + (columns[name][row] if name is not None else "") for text, name in parts)
            for row in range(len(rows))]  # fmt: skip


def written_texts(request: PrepareRequest) -> list[str]:
    """Everything that is tokenised of a split with prompts: prompts and responses, or the turns of the template.

    Raises:
        DataError: as `prepare_prompted`.
    """
    before, after = _written(request, *texts_of(request))
    return [*before, *after]


def _written(
    request: PrepareRequest, responses: Sequence[str], rows: np.ndarray
) -> tuple[Sequence[str], Sequence[str]]:
    """The text of each row before the first token that is predicted, and that after it."""
    config = request.config
    assert config.prompt is not None
    every = without_marks(request, prompt_texts(request.rows, config.prompt, request.origin), end=False)
    prompts = [every[row] for row in rows]
    if not config.chat:
        return prompts, responses
    return write_turns(request.tokenizer, prompts, responses, lambda number: request.origin.where(int(rows[number])))


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


def _note(request: PrepareRequest, num_rows: int, num_kept: int, num_cut: int) -> str:
    """What was lost to `max_length`; "" for nothing."""
    lost = num_rows - num_kept
    parts = [f"{lost:,} of {num_rows:,} rows left out: the prompt leaves no response to predict"] if lost else []
    parts += [f"{num_cut:,} of {num_kept:,} responses cut at the end"] if num_cut else []
    if not parts:
        return ""
    return f"{request.origin.name} ({request.split}), max_length {request.config.max_length}: " + "; ".join(parts)
