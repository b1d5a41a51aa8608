"""A model from a short description: architecture, layers, width, heads -> a transformers configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    RobertaConfig,
)

from mtkd.config import ModelConfig
from mtkd.data.glm_tokens import END, START
from mtkd.errors import UserError, nearest
from mtkd.models.glm import GLMConfig
from mtkd.models.info import CLASSIFIER, GLM
from mtkd.models.request import ModelRequest

_ROUND = 32
"""Gated feed-forward widths are rounded up to a multiple of this: matrix units work in tiles of it."""


@dataclass(frozen=True)
class _Architecture:
    """How a description becomes the configuration of an architecture.

    Attributes:
        config: transformers' class.
        names: its own names, where they are not those of `_fields`.
        gated: gated feed-forward units and grouped key/value heads.
        ends: it has ids for the begin and the end of a text.
        more: (fields, tokenizer, whether it is a classifier) -> fields that are its own or have other values.
    """

    config: type[PretrainedConfig]
    names: Mapping[str, str] = field(default_factory=dict)
    gated: bool = False
    ends: bool = True
    more: Callable[[dict[str, Any], PreTrainedTokenizerBase, bool], dict[str, Any]] | None = None


def fresh_config(config: ModelConfig, request: ModelRequest) -> PretrainedConfig:
    """The transformers configuration of a fresh model.

    Args:
        config: a description with `architecture`.
        request: the vocabulary is exactly its ids, without padding; its longest example is the default of
            `max_positions`.

    Raises:
        UserError: unknown architecture, too few positions, an option the architecture does not have, or RoBERTa without
            a pad token.
    """
    if config.architecture not in ARCHITECTURES:
        assert config.architecture is not None, "fresh models have one"
        raise UserError(
            "unknown architecture",
            where="@model.architecture",
            found=config.architecture,
            allowed=sorted(ARCHITECTURES),
            todo=nearest(config.architecture, ARCHITECTURES),
        )
    architecture = ARCHITECTURES[config.architecture]
    if config.kv_heads and not architecture.gated:
        raise UserError("key/value heads are for llama and qwen2", where="@model.kv_heads", found=config.kv_heads)
    fields = _fields(config, request, architecture)
    if architecture.more is not None:
        fields |= architecture.more(fields, request.tokenizer, request.auto_class == CLASSIFIER)
    fresh = architecture.config(**{architecture.names.get(name, name): value for name, value in fields.items()})
    set_dropout(fresh, config.dropout or 0.0)
    return fresh


def _fields(config: ModelConfig, request: ModelRequest, architecture: _Architecture) -> dict[str, Any]:
    """A description with its defaults, by transformers' names."""
    tokenizer, width = request.tokenizer, config.width
    assert width is not None
    assert config.heads is not None
    # A gated unit of 8/3 x width has as many parameters as an ungated one of 4 x width.
    units = -(-8 * width // (3 * _ROUND)) * _ROUND if architecture.gated else 4 * width
    fields = {
        "vocab_size": request.num_ids,
        "hidden_size": width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.intermediate or units,
        "max_position_embeddings": config.max_positions or request.max_positions,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if architecture.ends:
        fields |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return fields | ({"num_key_value_heads": config.kv_heads or config.heads} if architecture.gated else {})


def set_dropout(config: PretrainedConfig, share: float) -> None:
    """Set every dropout share of a configuration; the ones left open (None) follow the others anyway."""
    for name in _dropout_fields(config):
        setattr(config, name, share)


def _dropout_fields(config: PretrainedConfig) -> list[str]:
    values: dict[str, Any] = config.to_dict()
    drops = [name for name in values if "drop" in name]
    return [n for n in drops if isinstance(values[n], (int, float)) and not isinstance(values[n], bool)]


def _roberta(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, classifier: bool) -> dict[str, Any]:
    pad = fields["pad_token_id"]
    if pad is None:
        raise UserError("roberta counts positions from its pad token, and the tokenizer has none", where="tokenizer")
    positions = fields["max_position_embeddings"] + pad + 1  # the first position is pad + 1
    return {"max_position_embeddings": positions, "type_vocab_size": 1, "layer_norm_eps": 1e-5}


def _llama(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, classifier: bool) -> dict[str, Any]:
    # The embedding row of `pad_token_id` gets no gradient, so it must not be a token that is also text. A classifier
    # needs it nevertheless: it finds the last token of a row by it.
    pad, text = fields["pad_token_id"], (fields["bos_token_id"], fields["eos_token_id"])
    return {"pad_token_id": None if pad in text and not classifier else pad}


def _glm(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase, classifier: bool) -> dict[str, Any]:
    ids = tokenizer.get_vocab()
    return {
        "eos_token_id": ids.get(END, fields["eos_token_id"]),  # what ends a piece
        "mask_token_id": tokenizer.mask_token_id,
        "sop_token_id": ids.get(START),
    }


_DISTILBERT = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
               "intermediate_size": "hidden_dim"}  # fmt: skip
_GPT2 = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "intermediate_size": "n_inner", "max_position_embeddings": "n_positions"}  # fmt: skip

ARCHITECTURES = {
    "bert": _Architecture(BertConfig, ends=False),
    "roberta": _Architecture(RobertaConfig, more=_roberta),
    "distilbert": _Architecture(DistilBertConfig, _DISTILBERT, ends=False),
    "gpt2": _Architecture(GPT2Config, _GPT2),
    "llama": _Architecture(LlamaConfig, gated=True, more=_llama),
    "qwen2": _Architecture(Qwen2Config, gated=True, more=_llama),
    GLM: _Architecture(GLMConfig, more=_glm),
}
