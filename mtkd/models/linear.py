"""A model's linear layers on a CPU: their large float32 products go where they are fastest, forward and backward."""

from __future__ import annotations

from types import MethodType

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mtkd.models.products import linear


def speed_up_linears(model: nn.Module) -> None:
    """Let every `nn.Linear` (and GPT-2's `Conv1D`) of a model multiply through `mtkd.models.products.linear`.

    Nothing but the layers' `forward` changes: parameters, hooks, names and what is saved stay as they are. Layers of
    other classes, and those whose `forward` is replaced already (the tapped output head), are left alone.
    """
    for layer in model.modules():
        if "forward" in vars(layer):
            continue
        # Bound as methods, so that a copied model computes with its own weights. The exact classes: a subclass
        # (quantised, LoRA) computes something else.
        if type(layer) is nn.Linear:
            layer.forward = MethodType(_linear, layer)  # type: ignore[method-assign]
        elif type(layer) is Conv1D:
            layer.forward = MethodType(_transposed, layer)  # type: ignore[method-assign]


def _linear(layer: nn.Linear, inputs: Tensor) -> Tensor:
    return linear(inputs, layer.weight, layer.bias)


def _transposed(layer: Conv1D, inputs: Tensor) -> Tensor:
    return linear(inputs, layer.weight.t(), layer.bias)
