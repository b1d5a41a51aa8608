"""Number formats of weights: float32, and those that a checkpoint names in its own configuration.

A quantised checkpoint says its format as transformers has it: `quantization_config` in its config.json, whose
`quant_method` is the name of the format. A format is one function that exchanges the layers of a model. What a weight
takes in memory, what a step needs and which names the files must have are then read off the model that it returns;
nothing else has to know of the format. Formats are for teachers: their numbers get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mtkd.registry import Registry, note_everywhere

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Layout = Callable[["PreTrainedModel", Mapping[str, Any]], None]
"""(model, its `quantization_config`) -> exchanges layers in place.

All numbers of a new layer are `nn.Parameter`s without a gradient, by the names in the files. The model may be on the
meta device or made of fake tensors: a layout reads shapes and no values.
"""

FORMATS: Registry[Layout] = Registry("number format", "mtkd.models.formats")


def number_format(name: str) -> Callable[[Layout], Layout]:
    """Register the layout of a number format under its `quant_method`."""

    def register(layout: Layout) -> Layout:
        FORMATS.add(name, layout)
        note_everywhere()  # a model's folder names it, not the run
        return layout

    return register


def format_of(config: PretrainedConfig) -> str | None:
    """The `quant_method` of a configuration; None for plain float weights."""
    settings = _settings(config)
    return None if settings is None else str(settings["quant_method"])


def lay_out(model: PreTrainedModel) -> None:
    """Give a model the layers of its number format; a plain one stays as it is.

    Raises:
        UserError: an unknown format.
    """
    settings = _settings(model.config)
    if settings is not None:
        FORMATS.find(str(settings["quant_method"]), "@model")(model, settings)


def _settings(config: PretrainedConfig) -> Mapping[str, Any] | None:
    return getattr(config, "quantization_config", None) or None
