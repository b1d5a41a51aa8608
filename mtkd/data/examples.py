"""Rows to examples for the built-in tasks. Tokens lie in one flat array; an example is a stretch of it."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.collate import collate_pairs, collate_tokens
from mtkd.data.conversations import prepare_chats
from mtkd.data.encode import TOKENIZED_AT_ONCE, around_text, column_of, described, pad_id, texts_of, tokenized
from mtkd.data.labels import read_labels
from mtkd.data.marks import without_marks
from mtkd.data.masking import Masking
from mtkd.data.pairs import PairExamples, around_pair
from mtkd.data.progress import counted
from mtkd.data.prompts import prepare_prompted
from mtkd.data.split import Split
from mtkd.data.transfer import transfer_tokens
from mtkd.errors import DataError, UserError

if TYPE_CHECKING:
    from mtkd.data.split import PrepareRequest


class CausalExamples:
    """Stretches of documents; position l predicts the document's next token, also over the end of a stretch."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self._tokens, self._starts, self.lengths = tokens, starts, lengths

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Inputs [L] and the tokens that follow them [L]."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        return self._tokens[start : start + length], self._tokens[start + 1 : start + length + 1], None


class MaskedExamples:
    """Blocks with special tokens around them; which tokens are masked is a pure function of (seed, epoch, example)."""

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, masking: Masking) -> None:
        self._tokens, self._starts, self.lengths, self._masking = tokens, starts, lengths, masking

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, None]:
        """Inputs with masked tokens [L]; the original tokens where something is asked, else NO_LABEL [L]."""
        start, length = int(self._starts[index]), int(self.lengths[index])
        return *self._masking.apply(self._tokens[start : start + length], index, epoch), None


class ClassifyExamples:
    """One text or a pair of texts each, with its label."""

    def __init__(self, tokens: np.ndarray, types: np.ndarray | None, lengths: np.ndarray, labels: np.ndarray) -> None:
        self._tokens, self._types, self.lengths, self._labels = tokens, types, lengths, labels
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, float, np.ndarray | None]:
        """Inputs [L], the label, and token types [L] where the tokenizer makes them."""
        start, end = int(self._starts[index]), int(self._starts[index] + self.lengths[index])
        types = self._types[start:end] if self._types is not None else None
        return self._tokens[start:end], self._labels[index].item(), types


def prepare_causal(request: PrepareRequest) -> Split:
    """Every document, between the tokenizer's beginning and end tokens where it has them, cut into blocks.

    A block has `max_length` inputs and as many targets, the last of which is the next block's first input: every token
    after a document's first is predicted exactly once. Without a beginning token the first one cannot be predicted, so
    its bytes are not counted.
    """
    tokenizer, config = request.tokenizer, request.config
    if config.messages is not None:
        return prepare_chats(request)
    if config.prompt is not None:
        return prepare_prompted(request)
    before = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    after = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    texts, rows = texts_of(request)
    flat: list[np.ndarray] = []
    counts = np.zeros(len(texts), np.int64)
    scored = np.array([len(text.encode()) for text in texts], np.int64)
    for number, ids in enumerate(tokenized(request, texts)):
        document = np.array([*before, *ids, *after], np.int32)
        if len(document) < 2:
            raise DataError(
                "the text has only one token", where=request.origin.where(rows[number]), found=texts[number]
            )
        if not before:
            scored[number] -= len(str(tokenizer.decode(ids[:1])).encode())
        flat.append(document)
        counts[number] = len(document)
    firsts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    starts, lengths, of_example = _blocks(firsts, counts - 1, config.max_length)
    documents = described(request, rows, of_example, scored)
    examples = CausalExamples(np.concatenate(flat), starts, lengths)
    return Split(partial(collate_tokens, examples), lengths, documents, pad_id=pad_id(tokenizer))


def prepare_masked(request: PrepareRequest) -> Split:
    """Every document cut into blocks of at most `max_length` tokens, the special tokens around each included."""
    tokenizer, config = request.tokenizer, request.config
    masking = Masking(tokenizer, config.mask_share, config.seed)
    before, after = around_text(tokenizer)
    room = config.max_length - len(before) - len(after)
    if room < 1:
        raise UserError(
            "no room for a token", where="@data.max_length", found=config.max_length, allowed="a longer one"
        )
    texts, rows = texts_of(request)
    if config.next_sentence:
        return _paired(request, texts, rows, masking)
    flat: list[np.ndarray] = []
    of_example: list[int] = []
    for number, ids in enumerate(tokenized(request, texts)):
        for start in range(0, len(ids), room):
            flat.append(np.array([*before, *ids[start : start + room], *after], np.int32))
            of_example.append(number)
    lengths = np.array([len(block) for block in flat], np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    scored = np.array([len(text.encode()) for text in texts], np.int64)
    documents = described(request, rows, np.array(of_example, np.int64), scored)
    examples = MaskedExamples(np.concatenate(flat), starts, lengths, masking)
    return Split(partial(collate_tokens, examples), lengths, documents, pad_id=pad_id(tokenizer))


def _paired(request: PrepareRequest, texts: list[str], rows: np.ndarray, masking: Masking) -> Split:
    """Pairs of segments; every document is cut into equal stretches of at most `max_length` tokens."""
    tokenizer, config = request.tokenizer, request.config
    documents = [ids.astype(np.int32) for ids in tokenized(request, texts)]
    for number, ids in enumerate(documents):
        if len(ids) < 2:
            where = request.origin.where(rows[number])
            raise DataError("the text has only one token, which makes no pair", where=where, found=texts[number])
    if len(documents) < 2:
        raise DataError("pairs need a second document to draw from", where=request.origin.name, found="1 document")
    around = around_pair(tokenizer)
    room = config.max_length - sum(map(len, around))
    if room < 3:  # then every stretch has two tokens
        raise UserError("no room for a pair", where="@data.max_length", found=config.max_length, allowed="a longer one")
    examples = PairExamples(documents, room, around, masking, config.seed)
    scored = np.array([len(text.encode()) for text in texts], np.int64)
    documents_of = described(request, rows, examples.of_example, scored)
    collate = partial(collate_pairs, examples)
    return Split(collate, examples.lengths, documents_of, pad_id=pad_id(tokenizer), token_types=True)


def prepare_classify(request: PrepareRequest) -> Split:
    """One or two texts per row, the longer one cut first to `max_length` tokens, and the row's label."""
    tokenizer, config, origin = request.tokenizer, request.config, request.origin
    labels = read_labels(config, request.rows, origin, request.label_names)
    columns = [column_of(request, config.text, "text")]
    if config.text_pair:
        columns.append(column_of(request, config.text_pair, "text_pair"))
    columns = [without_marks(request, column) for column in columns]
    with_types = "token_type_ids" in tokenizer.model_input_names
    encoded_rows: list[list[int]] = []
    types: list[int] = []
    lengths = np.zeros(len(request.rows), np.int64)
    begins = range(0, len(request.rows), TOKENIZED_AT_ONCE)
    what = f"tokenizing {origin.name} ({request.split}), {TOKENIZED_AT_ONCE:,} rows each"
    for begin in counted(begins, what, len(begins), "parts", 1):
        encoded = tokenizer(
            *[column[begin : begin + TOKENIZED_AT_ONCE] for column in columns],
            truncation=True,
            max_length=config.max_length,
            return_attention_mask=False,
            return_token_type_ids=with_types,
        )
        for row, ids in enumerate(encoded["input_ids"], start=begin):
            if not ids:
                raise DataError("the text has no tokens", where=origin.where(row), found=columns[0][row])
            encoded_rows.append(ids)
            lengths[row] = len(ids)
        if with_types:
            types += [kind for kinds in encoded["token_type_ids"] for kind in kinds]
    scored = np.array([sum(len(text.encode()) for text in row) for row in zip(*columns, strict=True)], np.int64)
    every_row = np.arange(len(request.rows))
    flat = np.concatenate(transfer_tokens(encoded_rows, config, tokenizer, request.split)).astype(np.int32)
    examples = ClassifyExamples(flat, np.array(types, np.int32) if with_types else None, lengths, labels)
    return Split(
        partial(collate_tokens, examples),
        lengths,
        described(request, every_row, every_row, scored),
        pad_id=pad_id(tokenizer),
        labels=labels,
        token_types=with_types,
    )


def _blocks(firsts: np.ndarray, inputs: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Start, length and document of blocks of at most `most` inputs, for documents of some inputs each."""
    counts = -(-inputs // most)
    of_example = np.repeat(np.arange(len(inputs)), counts)
    within = np.arange(len(of_example)) - np.repeat(np.cumsum(counts) - counts, counts)
    lengths = np.minimum(most, inputs[of_example] - within * most)
    return firsts[of_example] + within * most, lengths, of_example
