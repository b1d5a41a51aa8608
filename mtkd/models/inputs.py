"""What a transformers model is called with, from a batch."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from mtkd.data.batch import NO_LABEL, Batch
from mtkd.errors import UserError
from mtkd.models.packing import Layout
from mtkd.models.vocabulary import VocabularyMap


class Inputs:
    """Makes the keyword arguments that a model takes.

    Args:
        model: a plain encoder or decoder with a head.
        vocabulary: of a model with a compressed one.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: VocabularyMap | None) -> None:
        self._architecture, self._vocabulary = model.config.model_type, vocabulary
        parameters = inspect.signature(model.forward).parameters
        # GPT-2 would add token types to the *word* embeddings; RoBERTa has a table of one row.
        types = getattr(model.config, "type_vocab_size", 0) or 0
        self._takes_types = "token_type_ids" in parameters and types > 1
        self._takes_parts = "sep" in parameters
        # Heads hand their keyword arguments on to the encoder or decoder, which would fill a cache by default.
        self._takes_cache = "use_cache" in inspect.signature(model.base_model.forward).parameters
        self._takes_positions = "position_ids" in parameters

    def of(self, batch: Batch, layout: Layout | None) -> dict[str, Any]:
        """The arguments for a batch of B sequences of L tokens.

        Args:
            layout: of packed rows, or None for padded ones.

        Raises:
            UserError: examples in two parts for another architecture than GLM, or on packed rows.
        """
        ids = batch.input_ids if self._vocabulary is None else self._vocabulary.inputs(batch.input_ids)  # [B,L]
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": batch.attention_mask.long()}
        if layout is not None:
            # a mask of four dimensions is taken as it is, by every model that makes its own with transformers' helpers
            inputs = {"input_ids": layout.pack(ids), "attention_mask": layout.mask, "position_ids": layout.position_ids}
        elif self._takes_types and batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        if batch.sep is not None:
            if layout is not None or not self._takes_parts:
                raise UserError(
                    "examples in two parts are for GLM, on rows of their own",
                    where="@model",
                    found=f"architecture '{self._architecture}'" + (", packed rows" if layout is not None else ""),
                )
            inputs |= {"position_ids": batch.position_ids, "sep": batch.sep}
        if self._takes_cache:
            inputs["use_cache"] = False
        return inputs

    def going_on(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> dict[str, Any]:
        """The arguments for more tokens of texts whose earlier ones are in `cache`.

        Args:
            ids: run ids of the new tokens, [B,N].
            mask: which tokens are real, those of the cache included, [B,L+N] bool.
            positions: of the new tokens in their texts, [B,N]; read by models that do not count by the mask.
        """
        own = ids if self._vocabulary is None else self._vocabulary.inputs(ids)  # [B,N]
        inputs = {"input_ids": own, "attention_mask": mask.long(), "past_key_values": cache, "use_cache": True}
        return inputs | {"position_ids": positions} if self._takes_positions else inputs


def few_tokens(model: PreTrainedModel, vocabulary: int, lengths: tuple[int, ...]) -> Batch:
    """Examples of the first real ids in turn, padded on the right.

    Args:
        vocabulary: rows of the embedding.
    """
    pad, size = model.config.pad_token_id, max(lengths)
    real = [i for i in range(min(vocabulary, 4)) if i != pad]
    tokens = torch.tensor([[real[(r + c) % len(real)] for c in range(size)] for r in range(len(lengths))])  # [B,L]
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]  # [B,L]
    batch = Batch(torch.arange(len(lengths)), tokens, mask, torch.full_like(tokens, NO_LABEL))
    return batch.to(next(model.parameters()).device)
