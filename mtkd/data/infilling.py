"""GLM's blank infilling: which stretches of a text become blanks, and how the two parts are laid out.

Part A is the text with one token in place of every stretch; part B is the stretches in random order, each begun by
<|startofpiece|> and predicted token by token up to <|endofpiece|>. Part A is seen in both directions, part B from left
to right. Everything drawn is a pure function of (seed, epoch, example).

The law is that of GLM-10B's training, but for this:

- The original draws one objective and one length of long spans per batch, and splits the texts of 2% of its batches
  (`short_seq_prob`): here nothing that is drawn may depend on which examples share a batch.
- It joins short texts to one example, which then has a suffix, never a long span elsewhere; it starts long texts at a
  random place. Here a text is cut into blocks, and a block is an example.
- It gives every place to spans by drawing with replacement: here every arrangement is equally likely.
- A text of one sentence becomes one blank there, and of a text's end without a mark none; here the former has spans
  (or a long span), and the latter is a sentence. The marks of sentences in Chinese, and line ends, count for every
  tokenizer.
- The least length of a long span counts special tokens and is rounded down there; here it is of the text, rounded up.
- Where 15% of a text round down to nothing, it asks for nothing: here one token.

Source: Du et al. 2022, GLM, arXiv 2103.10360, sections 2.1 (spans, positions) and 2.2 (sentences, long spans);
github.com/THUDM/GLM, config/ds_block_10B.sh and blocklm_utils.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.batch import NO_LABEL
from mtkd.data.glm_tokens import BLANKS, END, HIDDEN, START, command_ids
from mtkd.data.tokenizers import num_real_ids
from mtkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import DataConfig, InfillConfig

_PURPOSE = 104_729  # keeps these random numbers apart from others of the same seed
_SENTENCE_ENDS = ".!?;:\u2026\u3002\uff01\uff1f\uff1b\uff1a\n"

_MASK, _SMASK, _GMASK = range(3)
_NAMES = (BLANKS[0], BLANKS[2], BLANKS[1])

Span = tuple[int, int]
"""First token of a stretch, and the one after its last."""


@dataclass(frozen=True)
class Drawn:
    """What is asked of a block.

    Attributes:
        kind: 0 [MASK], 1 [sMASK], 2 [gMASK].
        spans: the stretches, in order of the text.
        suffix: the only stretch goes on to the end of what stands after the text, and has no end of piece.
    """

    kind: int
    spans: list[Span]
    suffix: bool = False


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
        around: special tokens before and after a text. Those before are never blanks; those after are the end of a
            suffix, and stand behind a text's last block only.

    Raises:
        UserError: a tokenizer without one of the blanks that are asked for, or without [dBLOCK].
        DataError: a tokenizer without GLM's commands.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, around: tuple[list[int], list[int]]
    ) -> None:
        ids, settings = command_ids(tokenizer), config.infill
        self._shares = np.array([settings.mask, settings.smask, settings.gmask])
        _check_commands(ids, settings)
        self._blanks = [ids.get(name, -1) for name in _NAMES]
        self._start, self._end, self._hidden = ids[START], ids[END], ids.get(HIDDEN, -1)
        self._before, self._after = around
        self._settings, self._share, self._seed = settings, config.mask_share, config.seed % 2**64
        self._tokenizer = tokenizer

    @cached_property
    def _ends(self) -> np.ndarray:
        """Made when a sentence is asked for: the plan asks for none, and decoding every id takes a second."""
        return _sentence_ends(self._tokenizer)

    def room(self, max_length: int) -> int:
        """Most tokens of a block, so that an example has at most `max_length`, for every draw.

        Raises:
            UserError: not even one.
        """
        for size in range(max_length, 0, -1):
            if self.most(size) <= max_length:
                return size
        raise UserError("no room for a blank", where="@data.max_length", found=max_length, allowed="a longer one")

    def most(self, size: int, *, last: bool = True) -> int:
        """Most tokens of an example made of a block of `size`: every stretch adds its blank and its start.

        Args:
            last: of its text, so that the special tokens after a text follow.
        """
        stretches = self._wanted(size, last) if self._shares[:_GMASK].any() else 1
        return self._whole(size, last) + 2 * stretches

    def _whole(self, size: int, last: bool) -> int:
        """Tokens of a block with the special tokens around it."""
        return len(self._before) + size + (len(self._after) if last else 0)

    def _wanted(self, size: int, last: bool) -> int:
        """Tokens at least that spans and sentences cover, and so the most of these that there can be."""
        return min(size, max(1, int(self._share * self._whole(size, last))))

    def draw(self, tokens: np.ndarray, example: int, epoch: int, *, last: bool = True) -> Drawn:
        """The objective and the stretches of one block."""
        random = np.random.default_rng([self._seed, _PURPOSE, epoch, example])
        kind, least = int(random.choice(3, p=self._shares / self._shares.sum())), self._wanted(len(tokens), last)
        if kind == _SMASK:
            if sentences := self._sentences(tokens, least, random):
                return Drawn(kind, sentences)
            # a single sentence: all of it would be asked for
            kind = _MASK if self._shares[_MASK] or not self._shares[_GMASK] else _GMASK
        if kind == _GMASK:
            return self._long(len(tokens), random)
        return Drawn(kind, self._spans(len(tokens), least, random))

    def lay_out(self, tokens: np.ndarray, example: int, epoch: int, *, last: bool = True) -> LaidOut:
        """A block in its two parts.

        Args:
            last: of its text, so that the special tokens after a text follow.
        """
        drawn = self.draw(tokens, example, epoch, last=last)
        random = np.random.default_rng([self._seed, _PURPOSE, epoch, example, 1])
        text = [*self._before, *tokens.tolist(), *(self._after if last else [])]
        inputs, places, pieces = self._part_a(text, drawn)
        sep = len(inputs)
        targets, first, second = [NO_LABEL] * sep, list(range(sep)), [0] * sep
        for number in random.permutation(len(pieces)):
            shown, predicted = self._piece(pieces[number], drawn, random)
            inputs += shown
            targets += predicted
            first += [places[number]] * len(predicted)
            second += range(1, len(predicted) + 1)
        return LaidOut(
            np.array(inputs, np.int64), np.array(targets, np.int64), np.array([first, second], np.int64), sep
        )

    def _part_a(self, text: list[int], drawn: Drawn) -> tuple[list[int], list[int], list[list[int]]]:
        """The text with its blanks, where in it these stand, and what each stands for."""
        part_a, places, pieces, done = list[int](), list[int](), list[list[int]](), 0
        for span in drawn.spans:
            begin, end = (place + len(self._before) for place in span)
            end = len(text) if drawn.suffix else end
            part_a += text[done:begin]
            places.append(len(part_a))
            part_a.append(self._blanks[drawn.kind])
            pieces.append(text[begin:end])
            done = end
        return [*part_a, *text[done:]], places, pieces

    def _piece(self, piece: list[int], drawn: Drawn, random: np.random.Generator) -> tuple[list[int], list[int]]:
        """What is read of a piece in part B, and what each position predicts: a suffix ends with the text itself."""
        if drawn.suffix:
            return [self._start, *piece[:-1]], piece
        hidden = random.random(len(piece)) < (self._settings.block_mask if drawn.kind == _MASK else 0.0)
        shown = [self._hidden if hide else token for hide, token in zip(hidden, piece, strict=True)]
        return [self._start, *shown], [*piece, self._end]

    def _long(self, size: int, random: np.random.Generator) -> Drawn:
        """One long span, anywhere or up to the end; the latter leaves a token to begin with where there are two."""
        least = max(1, math.ceil(self._settings.min_ratio * size))
        if random.random() < self._settings.anywhere:
            length = int(random.integers(least, size + 1))
            begin = int(random.integers(size - length + 1))
            return Drawn(_GMASK, [(begin, begin + length)])
        length = int(random.integers(least, max(least + 1, size)))
        return Drawn(_GMASK, [(size - length, size)], suffix=True)

    def _spans(self, size: int, least: int, random: np.random.Generator) -> list[Span]:
        """Spans of Poisson lengths until they cover `least` tokens, one token apart or more, at random places."""
        lengths = list[int]()
        while sum(lengths) < least:
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
        mean = self._settings.span
        first = -math.log1p(-random.random() * -math.expm1(-mean))
        return 1 + int(random.poisson(max(mean - first, 0.0)))

    def _sentences(self, tokens: np.ndarray, least: int, random: np.random.Generator) -> list[Span]:
        """Whole sentences in random order until they cover `least` tokens; [] where the block is one sentence."""
        ends = np.flatnonzero(self._ends[tokens]) + 1
        cuts = [0, *ends.tolist()]
        if cuts[-1] < len(tokens):
            cuts.append(len(tokens))
        sentences = list(pairwise(cuts))
        if len(sentences) < 2:
            return []
        chosen = list[Span]()
        for number in random.permutation(len(sentences)):
            if sum(end - begin for begin, end in chosen) >= least:
                break
            chosen.append(sentences[number])
        return sorted(chosen)


def _check_commands(ids: dict[str, int], settings: InfillConfig) -> None:
    """Refuse a tokenizer that cannot write what is asked for."""
    shares = dict(zip(_NAMES, (settings.mask, settings.smask, settings.gmask), strict=True))
    spans = settings.mask or not settings.gmask  # a single sentence has spans where no long span is asked for
    needed = {**shares, HIDDEN: settings.block_mask if spans else 0.0}
    for name, share in needed.items():
        if share and name not in ids:
            raise UserError(
                f"the tokenizer has no {name}",
                where="@data.infill.block_mask" if name == HIDDEN else "@data.infill",
                found=share,
                todo="use infill: {mask: 1, block_mask: 0}, as base and large do",
            )


def _sentence_ends(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Whether a sentence may end with an id, bool [ids]: it holds one of the marks that end one."""
    texts = tokenizer.batch_decode([[number] for number in range(num_real_ids(tokenizer))])
    special = set(tokenizer.all_special_ids)
    ends = [n not in special and any(mark in text for mark in _SENTENCE_ENDS) for n, text in enumerate(texts)]
    return np.array(ends, bool)
