"""A model from a short description: architecture, layers, width, heads -> a transformers configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
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
class _Shape:
    """A short description with its defaults filled in."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    intermediate: int | None
    positions: int
    vocabulary: int
    pad: int | None
    bos: int | None
    eos: int | None
    mask: int | None
    start: int | None
    end: int | None
    tie: bool
    classifier: bool

    @property
    def wide(self) -> int:
        """Feed-forward width, 4 x width by default."""
        return self.intermediate or 4 * self.width

    @property
    def gated(self) -> int:
        """Feed-forward width of a gated unit, 8/3 x width by default: as many parameters as an ungated one of 4 x."""
        return self.intermediate or -(-8 * self.width // (3 * _ROUND)) * _ROUND


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
    assert config.architecture is not None, "fresh models have one"
    assert config.layers is not None and config.width is not None and config.heads is not None  # noqa: PT018
    if config.architecture not in ARCHITECTURES:
        raise UserError(
            "unknown architecture",
            where="@model.architecture",
            found=config.architecture,
            allowed=sorted(ARCHITECTURES),
            todo=nearest(config.architecture, ARCHITECTURES),
        )
    if config.kv_heads and config.architecture not in ("llama", "qwen2"):
        raise UserError("key/value heads are for llama and qwen2", where="@model.kv_heads", found=config.kv_heads)
    tokenizer = request.tokenizer
    shape = _Shape(
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=config.kv_heads or config.heads,
        intermediate=config.intermediate,
        positions=config.max_positions or request.max_positions,
        vocabulary=request.num_ids,
        pad=tokenizer.pad_token_id,
        bos=tokenizer.bos_token_id,
        eos=tokenizer.eos_token_id,
        mask=tokenizer.mask_token_id,
        start=tokenizer.get_vocab().get(START),
        end=tokenizer.get_vocab().get(END),
        tie=config.tie_embeddings,
        classifier=request.auto_class == CLASSIFIER,
    )
    made = ARCHITECTURES[config.architecture](shape)
    set_dropout(made, config.dropout or 0.0)
    return made


def set_dropout(config: PretrainedConfig, share: float) -> None:
    """Set every dropout share of a configuration; the ones left open (None) follow the others anyway."""
    for name in _dropout_fields(config):
        setattr(config, name, share)


def _dropout_fields(config: PretrainedConfig) -> list[str]:
    values: dict[str, Any] = config.to_dict()
    drops = [name for name in values if "drop" in name]
    return [n for n in drops if isinstance(values[n], (int, float)) and not isinstance(values[n], bool)]


def _bert(shape: _Shape) -> PretrainedConfig:
    return BertConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.wide,
        max_position_embeddings=shape.positions,
        pad_token_id=shape.pad,
        tie_word_embeddings=shape.tie,
    )


def _roberta(shape: _Shape) -> PretrainedConfig:
    if shape.pad is None:
        raise UserError("roberta counts positions from its pad token, and the tokenizer has none", where="tokenizer")
    return RobertaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.wide,
        max_position_embeddings=shape.positions + shape.pad + 1,  # the first position is pad + 1
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=shape.pad,
        bos_token_id=shape.bos,
        eos_token_id=shape.eos,
        tie_word_embeddings=shape.tie,
    )


def _distilbert(shape: _Shape) -> PretrainedConfig:
    return DistilBertConfig(
        vocab_size=shape.vocabulary,
        dim=shape.width,
        n_layers=shape.layers,
        n_heads=shape.heads,
        hidden_dim=shape.wide,
        max_position_embeddings=shape.positions,
        pad_token_id=shape.pad,
        tie_word_embeddings=shape.tie,
    )


def _gpt2(shape: _Shape) -> PretrainedConfig:
    return GPT2Config(
        vocab_size=shape.vocabulary,
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.wide,
        n_positions=shape.positions,
        pad_token_id=shape.pad,
        bos_token_id=shape.bos,
        eos_token_id=shape.eos,
        tie_word_embeddings=shape.tie,
    )


def _llama_fields(shape: _Shape) -> dict[str, Any]:
    # The embedding row of `pad_token_id` gets no gradient, so it must not be a token that is also text. A classifier
    # needs it nevertheless: it finds the last token of a row by it.
    pad = None if shape.pad in (shape.bos, shape.eos) and not shape.classifier else shape.pad
    return {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.gated,
        "max_position_embeddings": shape.positions,
        "pad_token_id": pad,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "tie_word_embeddings": shape.tie,
    }


def _llama(shape: _Shape) -> PretrainedConfig:
    return LlamaConfig(**_llama_fields(shape))


def _qwen2(shape: _Shape) -> PretrainedConfig:
    return Qwen2Config(**_llama_fields(shape))


def _glm(shape: _Shape) -> PretrainedConfig:
    return GLMConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.wide,
        max_position_embeddings=shape.positions,
        pad_token_id=shape.pad,
        bos_token_id=shape.bos,
        eos_token_id=shape.eos if shape.end is None else shape.end,  # what ends a piece
        mask_token_id=shape.mask,
        sop_token_id=shape.start,
        tie_word_embeddings=shape.tie,
    )


ARCHITECTURES: dict[str, Callable[[_Shape], PretrainedConfig]] = {
    "bert": _bert,
    "roberta": _roberta,
    "distilbert": _distilbert,
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen2": _qwen2,
    GLM: _glm,
}
