"""A smaller model out of a larger one: some of its layers, and a slice of its width, heads and feed-forward units.

What a slice keeps: the first columns of the hidden width, the first feed-forward units, evenly spaced attention heads,
and inside a head evenly spaced dimensions. Query, key and value are cut separately and per head: a slice of the joined
matrix would mix them. A slice to the same shape is the identity.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.config import ModelConfig
from mtkd.errors import UserError, nearest
from mtkd.models.info import GLM


def cut_config(config: PretrainedConfig, model: ModelConfig) -> PretrainedConfig:
    """The configuration of the model that `cut_weights` cuts; the given one where nothing is cut.

    Raises:
        UserError: layers that do not exist, a shape that the loaded model cannot be cut to, or an architecture without
            rules for slices.
    """
    if model.keep_layers is not None:
        _check_kept(model.keep_layers, config.num_hidden_layers)
        config = _without_layers(config, model.keep_layers)
    return config if model.slice is None else _sliced_config(config, _shape(config, model))


def cut_weights(loaded: PreTrainedModel, model: ModelConfig) -> dict[str, Tensor]:
    """The state dict of the cut model: copies of the loaded model's weights."""
    weights: dict[str, Tensor] = loaded.state_dict()
    config = loaded.config
    if model.keep_layers is not None:
        weights = _kept_layers(loaded, weights, model.keep_layers)
        config = _without_layers(config, model.keep_layers)
    if model.slice is None:
        return weights
    axes = _axes(config, _shape(config, model))
    return {name: _sliced(name, value, axes, config.model_type) for name, value in weights.items()}


def _check_kept(layers: tuple[int, ...], num_layers: int) -> None:
    if list(layers) != sorted(set(layers)) or not layers or layers[-1] > num_layers or layers[0] < 1:
        raise UserError(
            "keep_layers must name different layers of the model, in rising order",
            where="@model.keep_layers",
            found=list(layers),
            allowed=f"1 to {num_layers}",
        )


def _without_layers(config: PretrainedConfig, layers: tuple[int, ...]) -> PretrainedConfig:
    """A copy for these layers only; lists with one entry per layer (``layer_types``) are cut too."""
    before = config.num_hidden_layers
    cut = type(config).from_dict(config.to_dict())
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, (list, tuple)) and len(value) == before:
            setattr(cut, name, [value[layer - 1] for layer in layers])
    cut.num_hidden_layers = len(layers)
    return cut


def _kept_layers(loaded: PreTrainedModel, weights: dict[str, Tensor], layers: tuple[int, ...]) -> dict[str, Tensor]:
    """These layers under their new numbers, and everything that is not a layer."""
    name = _layer_list(loaded)
    numbers = {str(layer - 1): str(position) for position, layer in enumerate(layers)}
    state = {}
    for key, value in weights.items():
        if not key.startswith(f"{name}."):
            state[key] = value
            continue
        number, _, rest = key.removeprefix(f"{name}.").partition(".")
        if number in numbers:
            state[f"{name}.{numbers[number]}.{rest}"] = value
    return state


def _layer_list(model: PreTrainedModel) -> str:
    """Name of the list of layers inside a model."""
    number = model.config.num_hidden_layers
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    outer = [n for n in lists if not any(n.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise UserError(
            f"architecture '{model.config.model_type}' has no single list of its layers to cut from",
            where="@model.keep_layers",
            found=outer or "none",
            todo=nearest(model.config.model_type, sorted(_RULES)),
        )
    return outer[0]


@dataclass(frozen=True)
class _Shape:
    """Width, heads (of query; of key and value), head width and feed-forward units; of a model, or asked of a slice."""

    width: int
    heads: int
    kv_heads: int
    head_width: int
    intermediate: int


def _whole_shape(config: PretrainedConfig) -> _Shape:
    heads, width = config.num_attention_heads, config.hidden_size
    return _Shape(
        width=width,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_width=getattr(config, "head_dim", None) or width // heads,
        intermediate=getattr(config, _INTERMEDIATE.get(config.model_type, "intermediate_size")) or 4 * width,
    )


def _shape(config: PretrainedConfig, model: ModelConfig) -> _Shape:
    """The slice's shape with its defaults filled in, checked against the model it is cut from."""
    cut = model.slice
    assert cut is not None
    if config.model_type not in _RULES:
        raise UserError(
            f"there are no rules to slice architecture '{config.model_type}'",
            where="@model.slice",
            allowed=sorted(_RULES),
            todo="drop slice (keep_layers works with every architecture)",
        )
    whole = _whole_shape(config)
    width = cut.width or whole.width
    # some models have heads that are wider or narrower than their share of the width: those keep their own head width
    coupled = whole.width == whole.heads * whole.head_width
    heads = cut.heads or (width // whole.head_width if coupled else whole.heads)
    if not heads or width % heads:
        raise UserError(
            "the heads do not divide the width",
            where="@model.slice.heads",
            found=f"{heads} heads (default: of the loaded model's head width, {whole.head_width}), width {width}",
        )
    kv_heads = cut.kv_heads or _default_kv_heads(whole, heads)
    intermediate = cut.intermediate or max(1, whole.intermediate * width // whole.width)
    shape = _Shape(width, heads, kv_heads, width // heads if coupled else whole.head_width, intermediate)
    _check_shape(shape, whole, config.model_type)
    return shape


def _default_kv_heads(whole: _Shape, heads: int) -> int:
    """As many query heads per key/value head as in the loaded model; all of a smaller number in one group."""
    group = whole.heads // whole.kv_heads
    return heads // group if heads >= group else 1


def _check_shape(shape: _Shape, whole: _Shape, architecture: str) -> None:
    for name, key in (("width", "width"), ("heads", "heads"), ("kv_heads", "kv_heads"), ("intermediate",) * 2):
        if getattr(shape, key) > getattr(whole, key):
            raise UserError(
                "a slice is not larger than the model it is cut from",
                where=f"@model.slice.{name}",
                found=getattr(shape, key),
                allowed=f"at most {getattr(whole, key)}",
            )
    if shape.head_width > whole.head_width:
        raise UserError(
            "the slice's heads are wider than the loaded model's",
            where="@model.slice.heads",
            found=f"{shape.head_width} (width {shape.width} / {shape.heads} heads)",
            allowed=f"at most {whole.head_width}",
            todo=f"take more heads or a smaller width; {shape.width // whole.head_width} heads keep the head width",
        )
    if architecture in _ROTARY and shape.head_width % 2:
        raise UserError(
            "rotary embedding turns pairs of dimensions: the head width must be even",
            where="@model.slice.heads",
            found=f"{shape.head_width} (width {shape.width} / {shape.heads} heads)",
        )
    if architecture not in _GROUPED:
        if shape.kv_heads != shape.heads:
            raise UserError(
                f"architecture '{architecture}' has no grouped heads",
                where="@model.slice.kv_heads",
                found=shape.kv_heads,
                todo="drop it",
            )
        return
    group, whole_group = shape.heads / max(shape.kv_heads, 1), whole.heads // whole.kv_heads
    if not shape.kv_heads or shape.heads % shape.kv_heads or group > whole_group:
        raise UserError(
            "the slice's groups of heads do not fit into the loaded model's",
            where="@model.slice.kv_heads",
            found=f"{shape.heads} heads, {shape.kv_heads} key/value heads",
            allowed=f"groups of equal size, at most {whole_group} heads each",
        )


def _sliced_config(config: PretrainedConfig, shape: _Shape) -> PretrainedConfig:
    cut = type(config).from_dict(config.to_dict())
    values: dict[str, Any] = {
        "hidden_size": shape.width,
        "num_attention_heads": shape.heads,
        _INTERMEDIATE.get(config.model_type, "intermediate_size"): shape.intermediate,
    }
    if config.model_type in _GROUPED:
        values["num_key_value_heads"] = shape.kv_heads
    if getattr(config, "head_dim", None):
        values["head_dim"] = shape.head_width
    for name, value in values.items():
        setattr(cut, name, value)
    return cut


def spread(count: int, total: int) -> list[int]:
    """`count` evenly spaced numbers of 0 to total - 1, the first of them 0."""
    return [i * total // count for i in range(count)]


def head_dimensions(count: int, total: int, *, rotary: bool) -> list[int]:
    """Dimensions kept inside a head: evenly spaced.

    Rotary embedding turns the pair (i, i + D/2) by the angle position * base^(-2i/D). Pairs stay together, and evenly
    spaced pairs keep their angles where the new head width divides the old one: i/D is then what it was.

    Source: Su et al. 2021, RoFormer, arXiv 2104.09864, section 3.2.2 (the halves are transformers' layout).
    """
    if not rotary:
        return spread(count, total)
    pairs = spread(count // 2, total // 2)
    return pairs + [i + total // 2 for i in pairs]


def _axes(config: PretrainedConfig, shape: _Shape) -> dict[str, Tensor]:
    """Per kind of axis the indices that are kept, in their new order."""
    whole = _whole_shape(config)
    dims = head_dimensions(shape.head_width, whole.head_width, rotary=config.model_type in _ROTARY)
    # Query heads are chosen inside the group of their key/value head, so that each keeps the head it attends with.
    groups, old_group = spread(shape.kv_heads, whole.kv_heads), whole.heads // whole.kv_heads
    heads = [group * old_group + i for group in groups for i in spread(shape.heads // shape.kv_heads, old_group)]
    query = torch.tensor([head * whole.head_width + d for head in heads for d in dims])
    block = whole.heads * whole.head_width  # of query, key or value in a fused matrix (GPT-2, GLM)
    return {
        "width": torch.arange(shape.width),
        "query": query,
        "kv": torch.tensor([head * whole.head_width + d for head in groups for d in dims]),
        "fused": torch.cat([query, query + block, query + 2 * block]),
        "ffn": torch.arange(shape.intermediate),
    }


def _sliced(name: str, value: Tensor, axes: dict[str, Tensor], architecture: str) -> Tensor:
    """The kept entries of one weight, as a copy."""
    module = name.rpartition(".")[0]
    for pattern, outputs, inputs in _RULES[architecture]:
        if not re.search(rf"(^|\.)({pattern})$", module):
            continue
        kinds = (outputs,) if value.dim() == 1 else (outputs, inputs)
        if value.dim() == 2 and architecture in _TRANSPOSED and re.search(_TRANSPOSED[architecture], module):
            kinds = (inputs, outputs)
        for axis, kind in enumerate(kinds):
            if kind != WHOLE:
                value = value.index_select(axis, axes[kind])
        return value.clone()
    raise AssertionError(f"no rule to slice {name} of {architecture}")


# How every weight of an architecture is cut: (module name's end, axis of the outputs, axis of the inputs). Biases and
# norms have the outputs' axis. Embeddings are tables [ids, width]: their first axis stays whole, like an output head's.
WHOLE = "whole"

_BERT_LAYER = (
    (r"attention\.self\.query", "query", "width"),
    (r"attention\.self\.(key|value)", "kv", "width"),
    (r"attention\.output\.dense", "width", "query"),
    (r"intermediate\.dense", "ffn", "width"),
    (r"layer\.\d+\.output\.dense", "width", "ffn"),
    (r"(word|position|token_type)_embeddings", WHOLE, "width"),
    (r"LayerNorm|layer_norm", "width", WHOLE),
    (r"pooler\.dense", "width", "width"),
)
_LLAMA = (
    (r"self_attn\.q_proj", "query", "width"),
    (r"self_attn\.(k_proj|v_proj)", "kv", "width"),
    (r"self_attn\.o_proj", "width", "query"),
    (r"mlp\.(gate_proj|up_proj)", "ffn", "width"),
    (r"mlp\.down_proj", "width", "ffn"),
    (r"embed_tokens|lm_head|score", WHOLE, "width"),
    (r"input_layernorm|post_attention_layernorm|norm", "width", WHOLE),
)
_RULES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "bert": (
        *_BERT_LAYER,
        (r"predictions\.transform\.dense", "width", "width"),
        (r"predictions|predictions\.decoder|seq_relationship|classifier", WHOLE, "width"),
    ),
    "roberta": (
        *_BERT_LAYER,
        (r"lm_head\.dense|classifier\.dense", "width", "width"),
        (r"lm_head|lm_head\.decoder|classifier\.out_proj", WHOLE, "width"),
    ),
    "distilbert": (
        (r"attention\.q_lin", "query", "width"),
        (r"attention\.(k_lin|v_lin)", "kv", "width"),
        (r"attention\.out_lin", "width", "query"),
        (r"ffn\.lin1", "ffn", "width"),
        (r"ffn\.lin2", "width", "ffn"),
        (r"(word|position)_embeddings|vocab_projector|classifier", WHOLE, "width"),
        (r"LayerNorm|sa_layer_norm|output_layer_norm|vocab_layer_norm", "width", WHOLE),
        (r"vocab_transform|pre_classifier", "width", "width"),
    ),
    "gpt2": (
        (r"attn\.c_attn", "fused", "width"),
        (r"attn\.c_proj", "width", "query"),
        (r"mlp\.c_fc", "ffn", "width"),
        (r"mlp\.c_proj", "width", "ffn"),
        (r"wte|wpe|lm_head|score", WHOLE, "width"),
        (r"ln_1|ln_2|ln_f", "width", WHOLE),
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    GLM: (
        (r"attention\.query_key_value", "fused", "width"),
        (r"attention\.dense", "width", "query"),
        (r"mlp\.dense_h_to_4h", "ffn", "width"),
        (r"mlp\.dense_4h_to_h", "width", "ffn"),
        (r"(word|position|block_position)_embeddings|lm_head|classifier", WHOLE, "width"),
        (r"input_layernorm|post_attention_layernorm|final_layernorm", "width", WHOLE),
        (r"pooler", "width", "width"),
    ),
}
_TRANSPOSED = {"gpt2": r"c_attn|c_proj|c_fc"}  # Conv1D: [inputs, outputs]
_ROTARY = _GROUPED = ("llama", "qwen2")
_INTERMEDIATE = {"distilbert": "hidden_dim", "gpt2": "n_inner"}
