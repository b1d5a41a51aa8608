"""Models without memory for their parameters: for what names, shapes and numbers of weights tell."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel


def meta_model(config: PretrainedConfig, auto_class: str) -> PreTrainedModel:
    """A model whose parameters and buffers are on the meta device, tied as they will be; it cannot run."""
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(config)
    model.tie_weights()
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within it modules are made without memory for their parameters; their buffers are computed as always.

    `torch.device("meta")` would leave the buffers without values. A parameter is moved the moment its module gets it:
    what initialises it afterwards has nothing to write to.
    """
    register = torch.nn.Module.register_parameter

    def on_meta(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = torch.nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
