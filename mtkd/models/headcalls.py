"""What the heads of a tapped model do in place of their own forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from mtkd.models.attention import active_recorder


def last_position(inputs: Mapping[str, Any], config: PretrainedConfig) -> Tensor:
    """The position that a decoder's classifier reads, [B].

    The last token that is neither padding by the mask nor the model's own padding token: plain transformers leaves
    that one out wherever it stands, also at the end of an unpadded text.

    Args:
        inputs: input_ids and attention_mask, [B,L].
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    real = (mask != 0) & (ids != config.pad_token_id)
    return (torch.arange(ids.shape[1], device=ids.device) * real).argmax(-1)


def head_forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Forward of an output head: while a recorder is active, keep the input and return logits of width 0, or all.

    Bound to the head as a method, so that a copied model is not tied to the original's head; the module's own call
    still runs its hooks, which is where ZeRO-3 gathers the weight.
    """
    recorder = active_recorder()
    if recorder is not None:
        recorder.head_input = hidden
        if hasattr(head.weight, "ds_id") and not head.weight.requires_grad:
            # ZeRO-3 gathered it for this call and frees it after. What shares its memory keeps it for the tiles, so
            # that it is gathered once per forward, on every rank, for any numbers of tiles. A student's (it
            # requires gradients) is the objective's own parameter.
            recorder.head = (head.weight.detach(), None if head.bias is None else head.bias.detach())
        if not recorder.whole_logits:
            return hidden[..., :0]
        with torch.autocast(hidden.device.type, enabled=False):
            # float32 as mtkd's own product has it: a head stored in bfloat16 would round what it is given, too
            bias = None if head.bias is None else head.bias.float()
            return nn.functional.linear(hidden.float(), head.weight.float(), bias)
    return nn.functional.linear(hidden, head.weight, head.bias)


def pooled_forward(head: nn.Linear, hidden: Tensor) -> Tensor:
    """Forward of a decoder's classification layer: at every position the logits of the one that is read, [B,L,C].

    transformers looks for that position by the padding token, which the model may not have or the texts may; what it
    then picks is the same everywhere. Outside of a tapped forward pass the layer is a plain one.
    """
    recorder = active_recorder()
    if recorder is None or recorder.last is None:
        return nn.functional.linear(hidden, head.weight, head.bias)
    at = hidden[torch.arange(len(hidden), device=hidden.device), recorder.last]
    return nn.functional.linear(at, head.weight, head.bias)[:, None].expand(-1, hidden.shape[1], -1)
