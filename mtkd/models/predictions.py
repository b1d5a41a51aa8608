"""The logits of a model: what its head was given and the head's weight, or the outputs of a classifier.

Token-level logits are not computed in the forward pass. The head hands on its input, and `HeadLogits` multiplies it
with the head's weight for the rows that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.errors import UserError
from mtkd.models.attention import Recorder
from mtkd.models.classes import ClassMap
from mtkd.models.features import DenseLogits, HeadLogits
from mtkd.models.headcalls import head_forward, last_position, pooled_forward
from mtkd.models.heads import output_layer, stand_in_pad
from mtkd.models.info import PRE_TRAINING, TOKEN_LEVEL, ModelInfo


class Predictions:
    """Reads logits off a model, whose head gets another forward function here.

    Args:
        model: with a head for `auto_class`.
        info: of the model, all its outputs included.
        num_ids: columns of token-level logits; those after them are padding and never reach a softmax.
        classes: of a classifier: which of its outputs are its logits; None for all, in their order.

    Raises:
        UserError: fewer embeddings than ids, or an output head that is not linear.
    """

    def __init__(
        self, model: PreTrainedModel, auto_class: str, info: ModelInfo, num_ids: int, classes: ClassMap | None
    ) -> None:
        self._model, self._num_ids = model, num_ids
        self.token_level = auto_class in TOKEN_LEVEL
        self._classes = classes
        self._num_outputs = info.vocabulary if self.token_level else info.num_labels
        self._two_heads = auto_class == PRE_TRAINING
        self._transform = head_transform(model.config)
        # GLM's classifiers are not causal: they read the first token, which they find by the mask
        self._pools_last = not self.token_level and info.causal
        if self.token_level:
            if info.vocabulary < num_ids:
                raise UserError(
                    "the model has fewer embeddings than the tokenizer has ids",
                    where="@model",
                    found=info.vocabulary,
                    allowed=f"at least {num_ids}",
                )
            self.head.forward = MethodType(head_forward, self.head)  # type: ignore[method-assign]
        elif self._pools_last:
            stand_in_pad(model.config)
            layer = output_layer(model)
            layer.forward = MethodType(pooled_forward, layer)  # type: ignore[method-assign]

    @property
    def head(self) -> nn.Linear:
        """The output head over the vocabulary."""
        head = self._model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            architecture = self._model.config.model_type
            raise UserError(
                f"architecture '{architecture}' has no linear output head", where="@model", found=type(head)
            )
        return head

    def last(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """The position that a decoder's classifier reads, [B]; None for other models."""
        return last_position(inputs, self._model.config) if self._pools_last else None

    def logits(self, recorder: Recorder, output: Any) -> DenseLogits | HeadLogits:
        """The logits after a forward pass, [B,L,V] or [B,C]."""
        if not self.token_level:
            return DenseLogits(output.logits) if self._classes is None else self._classes.logits(output.logits)
        if recorder.head_input is None:
            architecture = self._model.config.model_type
            raise UserError(f"architecture '{architecture}' never called its output head", where="@model")
        weight, bias = recorder.head or (self.head.weight, self.head.bias)
        return HeadLogits(recorder.head_input, weight, bias, self._num_ids, self._transform)

    def whole(self, output: Any, num_columns: int) -> Tensor:
        """The logits that the model computed itself, of all positions: [n,V] or [n,C]."""
        logits = output.prediction_logits if self._two_heads else output.logits
        logits = logits.float().reshape(-1, self._num_outputs)
        return logits[:, :num_columns] if self._classes is None else self._classes.logits(logits).values


def head_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """What the architecture does to its logits after the head: a soft cap, a factor, or nothing.

    Gemma 2 and 3 cap (``final_logit_softcapping``), Cohere multiplies (``logit_scale``), Granite divides
    (``logits_scaling``), Falcon-H1 multiplies (``lm_head_multiplier``). `TappedModel.verify` finds what is missing.
    """
    cap = getattr(config, "final_logit_softcapping", None)
    if cap:
        return partial(_soft_cap, cap=float(cap))
    if config.model_type.startswith("granite") and getattr(config, "logits_scaling", None):
        return partial(_scale, factor=1 / float(config.logits_scaling))
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(config, name, None):
            return partial(_scale, factor=float(getattr(config, name)))
    return None


def _soft_cap(logits: Tensor, *, cap: float) -> Tensor:
    return cap * torch.tanh(logits / cap)


def _scale(logits: Tensor, *, factor: float) -> Tensor:
    return logits * factor
