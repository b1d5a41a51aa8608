"""Draw a token from logits with noise that is a pure function of a few numbers.

The noise is a uniform number per row and token from a counter-based generator (Philox). It depends on the seed, the
step, the example, the number of the draw and the position, and on nothing else: not on the other rows of a batch, on
the rank, or on what was drawn before. So a resumed run writes the same text.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

WRITING, CHOOSING = 0, 1
"""What noise is for: two streams of the same seed share no number."""

_BLOCK = 256  # columns that are summed in float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn and where a text ends.

    Attributes:
        max_new_tokens: most tokens of a completion, the end token included.
        temperature: of the softmax; 0: the most probable token, without noise.
        top_p: mass of the most probable tokens that are drawn from, above 0.
        top_k: number of most probable tokens that are drawn from; 0 for all. Tokens as probable as the last one stay.
        ends: ids that end a text; they belong to it.
        max_length: most tokens that a row may be read with, prompt included; 0 for no limit. The last token that is
            written is not read again, so a row may have one more.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    ends: tuple[int, ...] = ()
    max_length: int = 0

    def noise(self, seed: int, step: int, keys: Sequence[int], draws: Sequence[int]) -> Tensor | None:
        """`uniforms` for every token that may be written, [rows,max_new_tokens]; None at temperature 0."""
        return uniforms(seed, step, keys, draws, self.max_new_tokens) if self.temperature else None


def uniforms(seed: int, step: int, keys: Sequence[int], draws: Sequence[int], count: int, use: int = WRITING) -> Tensor:
    """`count` numbers in [0, 1) per row, [rows,count] float64; row r is a function of (seed, step, key, draw) alone.

    Args:
        keys: of the rows' examples. draws: number of each row among those of its example; both [rows].
        use: `WRITING` or `CHOOSING`.
    """
    rows = np.empty((len(keys), count))
    for row, key, draw in zip(rows, keys, draws, strict=True):
        generator = np.random.Philox(key=[seed % 2**64, use], counter=[0, draw, key % 2**64, step])
        # numpy promises the raw stream for all of its releases, and that of its distributions not
        row[:] = (generator.random_raw(count) >> np.uint64(11)) * 2.0**-53
    return torch.from_numpy(rows)


def kept_logits(logits: Tensor, how: Sampling) -> Tensor:
    """Logits of the distribution that tokens are drawn from: at its temperature, -inf where nothing is drawn, [B,V].

    top_k comes before top_p, as in transformers.
    """
    if how.temperature not in (0, 1):
        logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        least = logits.topk(how.top_k, -1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if how.top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = torch.softmax(ordered, -1)
        before = probs.cumsum(-1) - probs  # [B,V], the mass of more probable tokens: 0 at the first, which stays
        ordered = ordered.masked_fill(before >= how.top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, order, ordered)
    return logits


def draw(logits: Tensor, how: Sampling, noise: Tensor | None) -> tuple[Tensor, Tensor]:
    """One column per row, and its log-probability in the distribution it is drawn from.

    By the inverse of the cumulative distribution: one uniform number per token, in the order of the columns. So a
    rounding of the logits moves a draw only where the number lies at a border.

    Args:
        logits: [B,V] float32.
        noise: uniform in [0,1), [B] float64; not read at temperature 0.
    Returns:
        (columns [B] int64, log-probabilities [B] float32, nats); at temperature 0 those of the softmax at 1.
    """
    logits = kept_logits(logits.float(), how)
    if how.temperature == 0:
        columns = logits.argmax(-1)
    else:
        assert noise is not None, "a draw at a temperature above 0 needs noise"
        columns = _at(torch.softmax(logits, -1), noise)
    return columns, logits.gather(-1, columns[:, None]).squeeze(-1) - logits.logsumexp(-1)


def _at(probs: Tensor, noise: Tensor) -> Tensor:
    """The column at which the cumulative probability of a row passes its number, [B].

    First among blocks of columns, then inside one: float64 sums of all columns would take longer than the softmax, and
    float32 ones of 100,000 columns would be off by more than rare tokens have.

    Args:
        probs: [B,V] float32. noise: in [0,1), [B] float64.
    """
    rows, columns = probs.shape
    parts = torch.nn.functional.pad(probs, (0, -columns % _BLOCK)).view(rows, -1, _BLOCK)  # [B,blocks,_BLOCK]
    sums = parts.sum(-1).double()  # [B,blocks]
    block, before = _passed(sums, noise * sums.sum(-1))
    inside = parts[torch.arange(rows, device=probs.device), block].double()  # [B,_BLOCK]
    # what is left of the number is scaled to the block: its float32 sum is not that of its columns to the last bit
    left = before / sums.gather(-1, block[:, None]).squeeze(-1) * inside.sum(-1)
    return block * _BLOCK + _passed(inside, left)[0]


def _passed(weights: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
    """(the first place at which the sum of the weights passes a level [B], what of the level is left there [B]).

    It has a weight above 0; a level that was rounded up to the whole sum is passed at the last such place.
    """
    sums = weights.cumsum(-1)  # [B,n]
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    place = torch.minimum((sums <= level[:, None]).sum(-1), last)
    return place, level - (sums - weights).gather(-1, place[:, None]).squeeze(-1)
