"""Rows to examples for GLM's own tasks: blocks of text with blanks to fill, and clozes whose answers are classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import BLANK, prompt_parts
from mtkd.data.collate import collate_laid, collate_tokens
from mtkd.data.encode import TOKENIZED_AT_ONCE, around_text, described, pad_id, texts_of, tokenize, tokenized
from mtkd.data.examples import ClassifyExamples
from mtkd.data.files import read_texts
from mtkd.data.infilling import Infilling, LaidOut
from mtkd.data.labels import read_labels
from mtkd.data.marks import marks_of
from mtkd.data.progress import counted
from mtkd.data.split import Split
from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import DataConfig
    from mtkd.data.split import PrepareRequest


class InfillExamples:
    """Blocks of documents; which tokens are blanked is a pure function of (seed, epoch, example).

    Args:
        tokens: all blocks one after another, without special tokens. sizes: of each block, [examples].
        last: whether a block is the last one of its document, bool [examples].
    """

    def __init__(self, tokens: np.ndarray, sizes: np.ndarray, last: np.ndarray, infilling: Infilling) -> None:
        self._tokens, self._sizes, self._last, self._infilling = tokens, sizes, last, infilling
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        most = (infilling.most(int(size), last=bool(ends)) for size, ends in zip(sizes, last, strict=True))
        self.lengths = np.array(list(most), np.int64)

    def lay_out(self, index: int, epoch: int) -> LaidOut:
        """Both parts with positions and the length of part A."""
        start = int(self._starts[index])
        block = self._tokens[start : start + int(self._sizes[index])]
        return self._infilling.lay_out(block, index, epoch, last=bool(self._last[index]))


def prepare_infill(request: PrepareRequest) -> Split:
    """Every document cut into blocks of at most `max_length` tokens with their blanks and pieces, for every draw.

    The special tokens before a text begin every block; those after a text end the last block of each document.
    """
    tokenizer, config = request.tokenizer, request.config
    infilling = Infilling(tokenizer, config, around_text(tokenizer))
    room = infilling.room(config.max_length)
    texts, rows = texts_of(request)
    flat: list[np.ndarray] = []
    of_example, last = list[int](), list[bool]()
    for number, ids in enumerate(tokenized(request, texts)):
        for start in range(0, len(ids), room):
            flat.append(ids[start : start + room].astype(np.int32))
            of_example.append(number)
            last.append(start + room >= len(ids))
    if not flat:
        raise DataError("the texts have no tokens", where=request.origin.name, found=texts[0])
    sizes = np.array([len(block) for block in flat], np.int64)
    scored = np.array([len(text.encode()) for text in texts], np.int64)
    documents = described(request, rows, np.array(of_example, np.int64), scored)
    examples = InfillExamples(np.concatenate(flat), sizes, np.array(last, bool), infilling)
    return Split(partial(collate_laid, examples), examples.lengths, documents, pad_id=pad_id(tokenizer))


def prepare_cloze(request: PrepareRequest) -> Split:
    """The template filled in per row, with the row's label; of one that is too long the longest column is cut.

    Raises:
        UserError: a tokenizer that does not tell where its tokens stand, or a template that is too long by itself.
        DataError: a row whose text holds the blank itself.
    """
    config, tokenizer = request.config, request.tokenizer
    if not tokenizer.is_fast or tokenizer.mask_token != BLANK:
        raise UserError(
            "a cloze needs a tokenizer that knows [MASK] and where its tokens stand",
            where="tokenizer",
            found=f"{type(tokenizer).__name__} with mask token {tokenizer.mask_token!r}",
            todo="build one with mtkd.models.glm.gpt2_tokenizer or bert_tokenizer, or train one with commands: glm",
        )
    labels = read_labels(config, request.rows, request.origin, request.label_names)
    texts, spans = _filled(request)
    encoded, num_cut = list[list[int]](), 0
    for row, (ids, owners) in enumerate(_owned(tokenizer, texts, spans)):
        if ids.count(int(tokenizer.mask_token_id)) != 1:
            where = request.origin.where(row)
            raise DataError("a text holds the blank itself", where=where, found=texts[row][:160], allowed=f"no {BLANK}")
        places = _fitted(owners, config.max_length)
        num_cut += len(places) < len(ids)
        encoded.append([ids[place] for place in places])
    lengths = np.array([len(ids) for ids in encoded], np.int64)
    note = f"{request.origin.name} ({request.split}), max_length {config.max_length}: "
    note += f"{num_cut:,} of {len(texts):,} texts cut, the blank never"
    every_row = np.arange(len(texts))
    scored = np.array([len(text.encode()) for text in texts], np.int64)
    examples = ClassifyExamples(np.concatenate(encoded).astype(np.int32), None, lengths, labels)
    return Split(
        partial(collate_tokens, examples),
        lengths,
        described(request, every_row, every_row, scored),
        pad_id=pad_id(tokenizer),
        labels=labels,
        note=note if num_cut else "",
    )


def answer_ids(config: DataConfig, tokenizer: PreTrainedTokenizerBase, where: str) -> list[list[int]]:
    """Token ids of every class's words, in the order of the classes.

    Raises:
        UserError: words without a token, or the same tokens for two classes.
    """
    words = [config.verbalizers[name] for name in config.classes]
    answers = list(tokenize(tokenizer, words))
    for number, (text, ids) in enumerate(zip(words, answers, strict=True)):
        if not ids or ids in answers[:number]:
            raise UserError(
                "words without a token" if not ids else "two classes have the same tokens",
                where=f"{where}.verbalizers.{config.classes[number]}",
                found=text,
                todo="choose other words",
            )
    return answers


def _filled(request: PrepareRequest) -> tuple[list[str], list[list[tuple[int, int]]]]:
    """The text of every row, and where in it each field's characters stand."""
    assert request.config.cloze is not None, "checked before"
    parts = prompt_parts(request.config.cloze, "cloze")
    columns = {name: read_texts(request.rows, name, request.origin, "cloze") for _, name in parts if name is not None}
    texts, spans, marks = list[str](), list[list[tuple[int, int]]](), marks_of(request)
    for row in range(len(request.rows)):
        text, places = "", list[tuple[int, int]]()
        for literal, name in parts:
            text += literal
            if name is not None:
                places.append((len(text), len(text) + len(columns[name][row])))
                text += columns[name][row]
        start, stop = marks.bounds(text)
        request.seen["marked"] += stop - start < len(text)
        texts.append(text[start:stop])
        spans.append([(max(first - start, 0), max(min(last, stop) - start, 0)) for first, last in places])
    return texts, spans


def _owned(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[list[tuple[int, int]]]
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids of every text, special ones included, and per id the number of its field; -1 for the template's.

    A token that reaches out of a field is the template's.
    """
    begins = range(0, len(texts), TOKENIZED_AT_ONCE)
    for begin in counted(begins, f"tokenizing, {TOKENIZED_AT_ONCE:,} texts each", len(begins), "parts", 1):
        part = slice(begin, begin + TOKENIZED_AT_ONCE)
        encoded = tokenizer(list(texts[part]), return_offsets_mapping=True, return_attention_mask=False, verbose=False)
        for ids, offsets, fields in zip(encoded["input_ids"], encoded["offset_mapping"], spans[part], strict=True):
            owners = []
            for start, end in offsets:
                # the space before a field's first word belongs to the word's token
                inside = [n for n, (first, last) in enumerate(fields) if first < end <= last and start >= first - 1]
                owners.append(inside[0] if inside and end > start else -1)
            yield ids, owners


def _fitted(owners: Sequence[int], most: int) -> list[int]:
    """Places of the ids that stay: the longest field loses its last token until they are `most`.

    Raises:
        UserError: the template alone is longer.
    """
    fields = {
        owner: [place for place, other in enumerate(owners) if other == owner] for owner in sorted({*owners} - {-1})
    }
    fixed = len(owners) - sum(map(len, fields.values()))
    if fixed > most:
        raise UserError(
            "the template alone is too long", where="@data.max_length", found=most, allowed=f"more than {fixed} tokens"
        )
    for _ in range(max(0, len(owners) - most)):
        max(fields.values(), key=len).pop()
    remaining = {place for places in fields.values() for place in places}
    return [place for place, owner in enumerate(owners) if owner == -1 or place in remaining]
