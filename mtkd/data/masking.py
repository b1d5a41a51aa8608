"""BERT's masking: which tokens of an example are asked for, and what stands in their place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mtkd.data.batch import NO_LABEL
from mtkd.data.tokenizers import num_real_ids
from mtkd.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Devlin et al. 2019, BERT, arXiv 1810.04805, section 3.1: of the selected tokens 80% become the mask token, 10% a
# random token, 10% stay as they are.
_MASKED_SHARE, _RANDOM_SHARE = 0.8, 0.1


class Masking:
    """BERT's masking with a seed: 80% mask token, 10% random token, 10% unchanged, special tokens never.

    Raises:
        UserError: for a tokenizer without a mask token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, share: float, seed: int) -> None:
        if tokenizer.mask_token_id is None:
            raise UserError(
                "the tokenizer has no mask token", where="@data.task", found="masked-lm", allowed="causal-lm"
            )
        self._mask_id = int(tokenizer.mask_token_id)
        self._special = np.array(sorted(tokenizer.all_special_ids))
        self._ordinary = np.setdiff1d(np.arange(num_real_ids(tokenizer)), self._special)
        self._share = share
        self._seed = seed % 2**64  # seeds of numpy are not negative

    def apply(self, tokens: np.ndarray, example: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Masked inputs and targets of one example, [L] each; at least one target where a token is ordinary."""
        random = np.random.default_rng([self._seed, epoch, example])
        inputs, targets = tokens.astype(np.int64), np.full(len(tokens), NO_LABEL, np.int64)
        open_to_choice = np.flatnonzero(~np.isin(tokens, self._special))
        if not len(open_to_choice):
            return inputs, targets
        chosen = open_to_choice[random.random(len(open_to_choice)) < self._share]
        if not len(chosen):
            chosen = random.choice(open_to_choice, 1)
        targets[chosen] = tokens[chosen]
        fate = random.random(len(chosen))
        substitutes = random.choice(self._ordinary, len(chosen))
        replaced = np.where(fate < _MASKED_SHARE + _RANDOM_SHARE, substitutes, inputs[chosen])
        inputs[chosen] = np.where(fate < _MASKED_SHARE, self._mask_id, replaced)
        return inputs, targets
