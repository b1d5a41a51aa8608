"""A model from its configuration: with values, without values, or without memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.models import attention, glm  # noqa: F401  registers the tap that models are built with, and our own type
from mtkd.models.formats import lay_out
from mtkd.models.info import attention_implementation


def new_model(config: PretrainedConfig, auto_class: str, seed: int) -> PreTrainedModel:
    """A model with new weights, in eval mode; the global random state is neither read nor changed."""
    with seeded(seed):
        return tapped_model(config, auto_class).eval()


def tapped_model(config: PretrainedConfig, auto_class: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose attention can be recorded, with the layers of its number format."""
    model: PreTrainedModel = getattr(transformers, auto_class).from_config(
        config, attn_implementation=attention_implementation(config, auto_class), dtype=dtype
    )
    lay_out(model)
    return model


def empty_model(config: PretrainedConfig, auto_class: str) -> PreTrainedModel:
    """A model with its parameters on the meta device; buffers are as its modules compute them."""
    with parameters_on_meta():
        return new_model(config, auto_class, seed=0)


def meta_model(config: PretrainedConfig, auto_class: str) -> PreTrainedModel:
    """A model that has float32 parameters and buffers on the meta device, tied as they will be; it cannot run.

    It is as its architecture has it, without a number format (`mtkd.models.formats.lay_out`).
    """
    with torch.device("meta"):
        model: PreTrainedModel = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it the CPU's random numbers start at `seed`; the global state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


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
