"""Transfer sets: token ids sampled or shuffled instead of read, so that teachers can be asked where there is no data.

What stands in the training split is replaced token by token, once and for all, as a pure function of the data seed and
the text's number; special tokens stay where they are, and so do the lengths. Validation and test splits stay real.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.tokenizers import num_real_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from mtkd.config import DataConfig, TransferConfig

_PURPOSE = 7_919  # keeps these random numbers apart from those of the masking, which has the same seed


def transfer_tokens(
    texts: Sequence[Sequence[int]], config: DataConfig, tokenizer: PreTrainedTokenizerBase, split: str
) -> list[np.ndarray]:
    """The ids of every text of a split, replaced as the `data` block says.

    Args:
        texts: ids of each text, special ones allowed.
    Returns:
        Arrays of the same lengths, int64.
    Source: random inputs as transfer sets: Krishna et al. 2019, Thieves on Sesame Street!, arXiv 1910.12366; Rashid et
        al. 2020, Towards Zero-Shot Knowledge Distillation for NLP, arXiv 2012.15495.
    """
    arrays = [np.array(ids, np.int64) for ids in texts]
    settings = config.noise
    if settings is None or split != "train":
        return arrays
    special = np.array(sorted(tokenizer.all_special_ids), np.int64)
    ordinary = np.setdiff1d(np.arange(num_real_ids(tokenizer)), special)
    # An unknown word is text like any other; some tokenizers use one id for it and for the ends of texts.
    ends = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    unknown = [] if tokenizer.unk_token_id in ends or tokenizer.unk_token_id is None else [tokenizer.unk_token_id]
    text = np.union1d(ordinary, np.array(unknown, np.int64))
    weights = _frequencies(arrays, ordinary) if settings.tokens == "frequency" else None
    return [
        _replaced(
            ids, settings, (text, ordinary), weights, np.random.default_rng([config.seed % 2**64, _PURPOSE, number])
        )
        for number, ids in enumerate(arrays)
    ]


def _frequencies(texts: list[np.ndarray], ordinary: np.ndarray) -> np.ndarray:
    """Share of each ordinary id among the ordinary tokens of all texts, [ordinary]."""
    counts = np.zeros(int(ordinary[-1]) + 1)
    for ids in texts:
        np.add.at(counts, ids[ids <= ordinary[-1]], 1)
    counts = counts[ordinary]
    return counts / counts.sum() if counts.sum() else np.full(len(ordinary), 1 / len(ordinary))


def _replaced(
    ids: np.ndarray,
    settings: TransferConfig,
    choices: tuple[np.ndarray, np.ndarray],
    weights: np.ndarray | None,
    random: np.random.Generator,
) -> np.ndarray:
    """One text's ids.

    Args:
        choices: ids that may be replaced, ids that may replace them.
    """
    text, ordinary = choices
    candidates = np.flatnonzero(np.isin(ids, text))
    chosen = candidates[random.random(len(candidates)) < settings.share]
    replaced = ids.copy()
    if settings.tokens == "shuffled":
        replaced[chosen] = ids[random.permutation(chosen)]
    else:
        replaced[chosen] = random.choice(ordinary, len(chosen), p=weights)
    return replaced
