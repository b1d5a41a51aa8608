"""Pairs of segments for next-sentence labels: the second follows the first in its document, or is of another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.masking import Masking
from mtkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FOLLOWS, RANDOM = 0, 1  # BERT's order of the two classes
_STREAM = 1  # apart from the masking's random numbers of the same (seed, epoch, example)


class PairExamples:
    """Stretches of documents cut in the middle; half of the time the second half is exchanged for another document's.

    Which half of the time, the other document and the place in it are a pure function of (seed, epoch, example), as
    the masking is. The exchanged segment is as long as the true one, or as the other document: its length tells
    nothing in long documents. Loss on it counts for the document of the first segment.

    Args:
        documents: token ids of each document without special tokens, at least two of two or more.
        room: tokens of both segments together, at least 3.
        around: special tokens before, between and after the segments.
        masking: applied to both segments.
        seed: of the choices.

    Source: Devlin et al. 2019, BERT, arXiv 1810.04805, section 3.1, task 2.
    """

    def __init__(
        self,
        documents: Sequence[np.ndarray],
        room: int,
        around: tuple[list[int], list[int], list[int]],
        masking: Masking,
        seed: int,
    ) -> None:
        self._documents, self._around, self._masking = documents, around, masking
        self._seed = seed % 2**64  # seeds of numpy are not negative
        self._stretches: list[np.ndarray] = []
        of_example: list[int] = []
        for number, document in enumerate(documents):
            # Equal stretches: the last one of a fixed length could be a single token, which makes no pair.
            parts = np.array_split(document, -(-len(document) // room))
            self._stretches += parts
            of_example += [number] * len(parts)
        self.of_example = np.array(of_example, np.int64)
        self.lengths = np.array([len(s) for s in self._stretches], np.int64) + sum(map(len, around))

    def next_sentence(self, index: int, epoch: int) -> int:
        """0: the second segment follows; 1: it is another document's."""
        return int(self._random(index, epoch).integers(2))

    def read(self, index: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masked inputs, targets and token types (0 to the end of the first segment, then 1), [L] each."""
        stretch = self._stretches[index]
        middle = -(-len(stretch) // 2)
        first, second = stretch[:middle], stretch[middle:]
        random = self._random(index, epoch)
        if int(random.integers(2)) == RANDOM:
            second = self._elsewhere(random, int(self.of_example[index]), len(second))
        before, between, after = (np.array(part, np.int32) for part in self._around)
        tokens = np.concatenate([before, first, between, second, after])
        types = np.zeros(len(tokens), np.int64)
        types[len(before) + len(first) + len(between) :] = 1
        return *self._masking.apply(tokens, index, epoch), types

    def _random(self, index: int, epoch: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, epoch, index, _STREAM])

    def _elsewhere(self, random: np.random.Generator, own: int, length: int) -> np.ndarray:
        """A segment of another document, every other one equally likely, every place in it too."""
        other = int(random.integers(len(self._documents) - 1))
        document = self._documents[other + (other >= own)]
        start = int(random.integers(max(len(document) - length, 0) + 1))
        return document[start : start + length]


def around_pair(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int], list[int]]:
    """The special tokens that the tokenizer puts before, between and after two texts.

    Raises:
        DataError: it changes the texts when it joins them.
    """
    probe = "a"
    bare: list[int] = tokenizer(probe, add_special_tokens=False)["input_ids"]
    full: list[int] = tokenizer(probe, probe)["input_ids"]
    places = [i for i in range(len(full) - len(bare) + 1) if full[i : i + len(bare)] == bare]
    if len(places) != 2:
        raise DataError("the tokenizer changes two texts when it joins them", where="tokenizer", found=full)
    first, second = places
    return full[:first], full[first + len(bare) : second], full[second + len(bare) :]
