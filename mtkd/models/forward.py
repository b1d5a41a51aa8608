"""A model's forward pass in the stage's number format."""

from __future__ import annotations

from collections.abc import Callable

import torch

from mtkd.data.batch import Batch
from mtkd.models.features import Features, Logits, as_logits

LOGITS = frozenset({"logits"})
"""What a reader of predictions wants of a model."""


def number_format(device_type: str, dtype: torch.dtype) -> torch.autocast:
    """Autocast to bfloat16 or nothing; parameters stay float32 either way. `device_type`: "cpu" or "cuda"."""
    return torch.autocast(device_type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def features_of(
    model: Callable[[Batch, frozenset[str]], Features], batch: Batch, wants: frozenset[str], dtype: torch.dtype
) -> Features:
    """The features of a batch, which is on the model's device, with matrix products in `dtype`."""
    with number_format(batch.input_ids.device.type, dtype):
        return model(batch, wants)


def logits_of(model: Callable[[Batch, frozenset[str]], Features], batch: Batch, dtype: torch.dtype) -> Logits:
    """The logits of a batch. Whoever reads a sharded head gathers it first, and casts (`Logits.in_dtype`) inside."""
    return as_logits(features_of(model, batch, LOGITS, dtype)["logits"])
