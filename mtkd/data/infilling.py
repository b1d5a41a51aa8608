"""GLM's blank infilling: which stretches of a block become blanks, and how the two parts are laid out.

Part A is the block with one token in place of every stretch; part B is the stretches in random order, each begun by
<|startofpiece|> and predicted token by token up to <|endofpiece|>. Part A is seen in both directions, part B from left
to right. Everything drawn is a pure function of (seed, epoch, example).

Source: Du et al. 2022, GLM, arXiv 2103.10360, sections 2.1 (spans, positions) and 2.2 (sentences, suffixes).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.glm_tokens import BLANKS, END, START, command_ids
from mtkd.data.tokenizers import num_real_ids
from mtkd.errors import UserError
from mtkd.features import NO_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import DataConfig

_PURPOSE = 104_729  # keeps these random numbers apart from others of the same seed
_SHORTEST_SUFFIX = 0.5  # of the block's tokens; the longest is all of them
_SENTENCE_ENDS = ".!?;\u2026\u3002\uff01\uff1f\uff1b\n"

Span = tuple[int, int]
"""First token of a stretch, and the one after its last."""


@dataclass(frozen=True)
class LaidOut:
    """An example of L tokens in two parts.

    Attributes:
        inputs: part A, then part B, int64 [L].
        targets: what each position of part B predicts, NO_LABEL in part A, int64 [L].
        positions: row 0: index in part A, or that of the blank that a piece fills; row 1: 0 in part A, 1, 2, ... in a
            piece; int64 [2,L].
        sep: tokens of part A.
    """

    inputs: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    sep: int


class Infilling:
    """The law by which the examples of a `data` block get their blanks.

    Args:
        around: special tokens before and after a text, which are never blanks.

    Raises:
        UserError: a tokenizer without one of the blanks that are asked for.
        DataError: a tokenizer without GLM's commands.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, around: tuple[list[int], list[int]]
    ) -> None:
        ids, settings = command_ids(tokenizer), config.infill
        self._shares = np.array([settings.mask, settings.smask, settings.gmask])
        names = (BLANKS[0], BLANKS[2], BLANKS[1])
        for name, share in zip(names, self._shares, strict=True):
            if share and name not in ids:
                raise UserError(
                    f"the tokenizer has no {name}",
                    where="data.infill",
                    found=share,
                    todo="use infill: {mask: 1}, as base and large do",
                )
        self._blanks = [ids.get(name, -1) for name in names]
        self._start, self._end = ids[START], ids[END]
        self._before, self._after = around
        self._share, self._mean, self._seed = config.mask_share, settings.span, config.seed % 2**64
        self._tokenizer = tokenizer

    @cached_property
    def _ends(self) -> np.ndarray:
        """Made when a sentence is asked for: the plan asks for none, and decoding every id takes a second."""
        return _sentence_ends(self._tokenizer)

    def room(self, max_length: int) -> int:
        """Most tokens of a block, so that an example has at most `max_length` whatever is drawn.

        Raises:
            UserError: not even one.
        """
        for size in range(max_length, 0, -1):
            if self.most(size) <= max_length:
                return size
        raise UserError("no room for a blank", where="data.max_length", found=max_length, allowed="a longer one")

    def most(self, size: int) -> int:
        """Most tokens of an example made of a block of `size`: every stretch adds its blank and its start."""
        stretches = self._wanted(size) if self._shares[:2].any() else 1
        return len(self._before) + size + len(self._after) + 2 * stretches

    def _wanted(self, size: int) -> int:
        """Tokens at least that spans and sentences cover, and so the most of these that there can be."""
        return max(1, math.ceil(self._share * size))

    def draw(self, tokens: np.ndarray, example: int, epoch: int) -> tuple[int, list[Span]]:
        """Objective (0 [MASK], 1 [sMASK], 2 [gMASK]) and the stretches of one block, in order of the text."""
        random = np.random.default_rng([self._seed, _PURPOSE, epoch, example])
        kind = int(random.choice(3, p=self._shares / self._shares.sum()))
        if kind == 2:
            length = int(random.integers(math.ceil(_SHORTEST_SUFFIX * len(tokens)), len(tokens) + 1))
            return kind, [(len(tokens) - length, len(tokens))]
        if kind == 1:
            found = self._sentences(tokens, random)
            if found:
                return kind, found
            kind = 0 if self._shares[0] or not self._shares[2] else 2  # a single sentence: all of it would be asked for
            if kind == 2:
                return kind, [(len(tokens) - math.ceil(_SHORTEST_SUFFIX * len(tokens)), len(tokens))]
        return kind, self._spans(len(tokens), random)

    def lay_out(self, tokens: np.ndarray, example: int, epoch: int) -> LaidOut:
        """A block in its two parts."""
        kind, spans = self.draw(tokens, example, epoch)
        random = np.random.default_rng([self._seed, _PURPOSE, epoch, example, 1])
        part_a, places, last = [*self._before], [], 0
        for begin, end in spans:
            part_a += tokens[last:begin].tolist()
            places.append(len(part_a))
            part_a.append(self._blanks[kind])
            last = end
        part_a += [*tokens[last:].tolist(), *self._after]
        inputs, sep = [*part_a], len(part_a)
        targets, first, second = [NO_LABEL] * sep, list(range(sep)), [0] * sep
        for number in random.permutation(len(spans)):
            piece = tokens[slice(*spans[number])].tolist()
            inputs += [self._start, *piece]
            targets += [*piece, self._end]
            first += [places[number]] * (len(piece) + 1)
            second += range(1, len(piece) + 2)
        return LaidOut(
            np.array(inputs, np.int64), np.array(targets, np.int64), np.array([first, second], np.int64), sep
        )

    def _spans(self, size: int, random: np.random.Generator) -> list[Span]:
        """Spans of Poisson lengths until they cover the share, at least one token apart, at random places."""
        wanted, lengths = self._wanted(size), list[int]()
        while sum(lengths) < wanted:
            # what lies outside must hold the gaps; the last span of a short block is cut
            lengths.append(max(1, min(self._length(random), size - sum(lengths) - len(lengths))))
        while len(lengths) > 1 and sum(lengths) + len(lengths) - 1 > size:
            lengths.pop()
        random.shuffle(lengths)
        # The free tokens beyond one per gap fall anywhere: choosing the spans' places among them and the spans is
        # uniform over all arrangements.
        free = size - sum(lengths) - (len(lengths) - 1)
        chosen = np.sort(random.choice(free + len(lengths), len(lengths), replace=False))
        spans, begin = list[Span](), 0
        for number, length in enumerate(lengths):
            begin = int(chosen[number]) + sum(lengths[:number])
            spans.append((begin, begin + length))
        return spans

    def _length(self, random: np.random.Generator) -> int:
        """Poisson's law without its zero: the first event falls into the interval, the others behind it."""
        first = -math.log1p(-random.random() * -math.expm1(-self._mean))
        return 1 + int(random.poisson(max(self._mean - first, 0.0)))

    def _sentences(self, tokens: np.ndarray, random: np.random.Generator) -> list[Span]:
        """Whole sentences in random order until they cover the share; [] where the block is one sentence."""
        ends = np.flatnonzero(self._ends[tokens]) + 1
        cuts = [0, *ends.tolist()]
        if cuts[-1] < len(tokens):
            cuts.append(len(tokens))
        sentences = list(pairwise(cuts))
        if len(sentences) < 2:
            return []
        chosen, wanted = list[Span](), self._wanted(len(tokens))
        for number in random.permutation(len(sentences)):
            if sum(end - begin for begin, end in chosen) >= wanted:
                break
            chosen.append(sentences[number])
        return sorted(chosen)


def _sentence_ends(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Whether a sentence may end with an id, bool [ids]: it holds one of the marks that end one."""
    texts = tokenizer.batch_decode([[number] for number in range(num_real_ids(tokenizer))])
    special = set(tokenizer.all_special_ids)
    found = [n not in special and any(mark in text for mark in _SENTENCE_ENDS) for n, text in enumerate(texts)]
    return np.array(found, bool)
