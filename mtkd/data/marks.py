"""Beginning and end tokens that a text brings along: tokenizer or task write them, so that each is there once.

Prompts that were formatted by a chat template, and texts that were made for another program, often hold them already.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from mtkd.registry import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.data.split import PrepareRequest


@dataclass(frozen=True)
class Marks:
    """The tokens that are written before and after a text, as they stand in a text."""

    begin: tuple[str, ...] = ()
    end: tuple[str, ...] = ()

    def bounds(self, text: str) -> tuple[int, int]:
        """Where the text between its own marks begins and stops; white space outside of them goes with them."""
        start, stop = 0, len(text)
        while mark := next((m for m in self.begin if text[start:].lstrip().startswith(m)), None):
            start = text.index(mark, start) + len(mark)
        while mark := next((m for m in self.end if text[start:stop].rstrip().endswith(m)), None):
            stop = text.rindex(mark, start, stop)
        return start, stop

    def bare(self, text: str) -> str:
        """The text without its own marks."""
        start, stop = self.bounds(text)
        return text[start:stop]


def marks_of(request: PrepareRequest) -> Marks:
    """What is written around a text of this request: the task's beginning and end, or what the tokenizer adds."""
    tokenizer, task = request.tokenizer, TASKS.find(request.config.task)
    if task.auto_class == "AutoModelForCausalLM" and not task.laid:
        return Marks(_written(tokenizer, [tokenizer.bos_token_id]), _written(tokenizer, [tokenizer.eos_token_id]))
    pair = ["a"] if request.config.text_pair or request.config.next_sentence else []
    around = _special_runs(tokenizer, tokenizer("a", *pair)["input_ids"])
    return Marks(_written(tokenizer, around[0] + around[1]), _written(tokenizer, around[1] + around[2]))


def without_marks(request: PrepareRequest, texts: Sequence[str], *, begin: bool = True, end: bool = True) -> list[str]:
    """Texts without their own marks; how many had some is counted in `request.seen`.

    Args:
        begin, end: which of the two sides is looked at.
    """
    marks = marks_of(request)
    marks = Marks(marks.begin if begin else (), marks.end if end else ())
    stripped = [marks.bare(text) for text in texts]
    request.seen["marked"] += sum(len(a) != len(b) for a, b in zip(texts, stripped, strict=True))
    return stripped


def _special_runs(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """The special ids before, within and after the texts."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id, tokenizer.mask_token_id}
    before = list(takewhile(special.__contains__, ids))
    after = list(takewhile(special.__contains__, reversed(ids[len(before) :])))
    within = ids[len(before) : len(ids) - len(after)]
    return before, [number for number in within if number in special], after


def _written(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int | None]) -> tuple[str, ...]:
    """The tokens of these ids that a text can hold: written in it, they become that very id."""
    tokens = {str(tokenizer.convert_ids_to_tokens(number)): number for number in ids if number is not None}
    return tuple(
        token
        for token, number in tokens.items()
        if token.strip() and tokenizer(token, add_special_tokens=False)["input_ids"] == [number]
    )
