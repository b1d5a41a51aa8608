"""How many numbers a model has, and the bytes that they take: the one place where a weight has a size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mtkd.models.create import meta_model
from mtkd.models.formats import lay_out
from mtkd.models.info import TOKEN_LEVEL

FLOAT = torch.float32.itemsize
"""Bytes of a weight, a gradient or a moment without another number format, in whichever type its file holds it."""


@dataclass(frozen=True)
class Numbers:
    """The size of a model, tied parameters once.

    Attributes:
        parameters: as its architecture counts them, in any number format.
        weights: bytes in memory, scales of a number format included.
        head: bytes of the output head over the vocabulary, which are part of `weights`; 0 for a classifier.
        trainable: parameters that can get a gradient.
    """

    parameters: int
    weights: int = 0
    head: int = 0
    trainable: int = 0


def count_parameters(config: PretrainedConfig, auto_class: str) -> int:
    """Number of parameters, tied ones once; built on the meta device, so it takes no memory.

    Args:
        auto_class: "AutoModel" counts the bare encoder or decoder.
    """
    return sum(parameter.numel() for parameter in meta_model(config, auto_class).parameters())


def numbers_of(config: PretrainedConfig, auto_class: str) -> Numbers:
    """The size of the model of a configuration, in its number format; takes no memory.

    Raises:
        UserError: an unknown number format.
    """
    model = meta_model(config, auto_class)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    with torch.device("meta"):  # a format may make its numbers with `torch.zeros`
        lay_out(model)
    head = model.get_output_embeddings() if auto_class in TOKEN_LEVEL else None
    return Numbers(
        parameters,
        weights=num_bytes(model.parameters()),
        head=0 if head is None else num_bytes(p for name, p in head.named_parameters() if name != "bias"),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors that have no values."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)
