"""GLM's stack of layers: three embeddings added, pre-norm blocks, one fused matrix for query, key and value.

Attention goes through transformers' attention interface, so that the taps of `mtkd.models.attention` see it.

Source: Du et al. 2022, GLM, arXiv 2103.10360, section 2.2; Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053 (the
order of normalisation and residual connection, the fresh weights).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from mtkd.models.glm.configuration import GLMConfig
from mtkd.models.glm.inputs import Sep, check_positions, default_positions, prefix_mask, split_mask, two_rows


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,  # transformers' attention interface
) -> tuple[Tensor, Tensor]:
    """Attention written out, which also returns its probabilities: [B,L,A,D] and [B,A,L,L]."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    probs = torch.softmax(scores, -1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    mixed = nn.functional.dropout(probs, dropout, module.training) @ value
    return mixed.transpose(1, 2), probs


def _residual_projection(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose output is added to the residual stream: its fresh weights are smaller."""
    layer = nn.Linear(inputs, outputs)
    layer.ends_in_residual = True  # type: ignore[assignment]
    return layer


class TokenTable(nn.Embedding):
    """The vectors of the tokens, and what is multiplied with them.

    Called with ids it looks them up; called with hidden states [...,H] it gives their products with every vector,
    [...,V]. Both go through the module's own call, which is where ZeRO-3 gathers the weight.
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight) if input.is_floating_point() else super().forward(input)


class GLMAttention(nn.Module):
    """softmax(q k^T / sqrt(D), mask) v; query, key, value are the thirds of one product, heads are blocks in each."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True  # where no mask is given
        self.num_heads = config.num_attention_heads
        self.scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = _residual_projection(config.hidden_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,  # transformers' attention interface
    ) -> tuple[Tensor, Tensor | None]:
        """[B,L,H] -> [B,L,H] and, with eager attention, the probabilities [B,A,L,K]."""
        thirds = self.query_key_value(hidden_states).chunk(3, -1)
        query, key, value = (third.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for third in thirds)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        mixed, probs = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.output_dropout(self.dense(mixed.flatten(2))), probs


class GLMMLP(nn.Module):
    """W2 gelu(W1 x + b1) + b2."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None, "filled in by the configuration"
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.dense_4h_to_h = _residual_projection(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[B,L,H] -> [B,L,H]."""
        return self.dropout(self.dense_4h_to_h(self.activation(self.dense_h_to_4h(hidden_states))))


class GLMLayer(GradientCheckpointingLayer):
    """x += attention(LN(x)); x += mlp(LN(x))."""

    def __init__(self, config: GLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = GLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GLMMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,  # transformers' attention interface
    ) -> Tensor:
        """[B,L,H] -> [B,L,H]."""
        mixed, _ = self.attention(
            self.input_layernorm(hidden_states), attention_mask, past_key_values=past_key_values, **kwargs
        )
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class GLMPreTrainedModel(PreTrainedModel):
    """What transformers must know of every GLM: names, capabilities, fresh weights."""

    config: GLMConfig
    config_class = GLMConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _input_embed_layer = "word_embeddings"
    _no_split_modules = ["GLMLayer"]  # noqa: RUF012  transformers' interface
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": GLMLayer, "attentions": GLMAttention}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """N(0, initializer_range); the projections that end in the residual stream over sqrt(2 N)."""
        super()._init_weights(module)
        # at the layer itself: transformers never asks for modules of ours that hold no parameters of their own
        if isinstance(module, nn.Linear) and getattr(module, "ends_in_residual", False):
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)


class GLMModel(GLMPreTrainedModel):
    """Embeddings, layers and the last normalisation, without a head."""

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        width, positions = config.hidden_size, config.max_position_embeddings + 1
        self.word_embeddings = TokenTable(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(positions, width)
        self.block_position_embeddings = nn.Embedding(positions, width)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.layers = nn.ModuleList([GLMLayer(config, i) for i in range(config.num_hidden_layers)])
        self.final_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B,L]
        position_ids: Tensor | None = None,  # [B,2,L]
        attention_mask: Tensor | None = None,
        sep: Sep = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # [B,L,H]
        use_cache: bool | None = None,
        **kwargs: Any,  # transformers' interface: output_hidden_states and the like
    ) -> BaseModelOutputWithPast:
        """Hidden states [B,L,H] after the last normalisation.

        Args:
            position_ids: row 0: index in part A, or of the [MASK] that a piece fills; row 1: 0 in part A, 1, 2, ... in
                a piece. [B,L] is row 0 alone. Default: tokens counted from 0, all of part A.
            attention_mask: which tokens are real, [B,L] with 1 and 0 (those of the cache included); or which keys a
                query sees, [B,1,L,L] with 1 and 0; or what `sep` is, as the original has it.
            sep: tokens of part A, a number or [B]; default 0: every token sees those before it. It counts
                tokens of [B,L] that are real, so that padding on the left moves part A along.
            past_key_values: a `DynamicCache`.

        Raises:
            ValueError: inputs of other shapes, positions that the model has not got, or a cache of fixed size.
        """
        kwargs.pop("output_attentions", None)
        kwargs.pop("output_hidden_states", None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        embedded = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        batch, queries, _ = embedded.shape
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        keys = queries + _cached_tokens(past_key_values)
        padding, sep = split_mask(attention_mask, sep)
        device = embedded.device
        mask = prefix_mask(padding, sep, batch=batch, queries=queries, keys=keys, device=device)
        if position_ids is None:
            position_ids = default_positions(padding, queries=queries, keys=keys, device=device)
        hidden = self.embedding_dropout(self._placed(embedded, two_rows(position_ids)))
        for layer in self.layers:
            hidden = layer(hidden, mask, past_key_values=past_key_values, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.final_layernorm(hidden), past_key_values=past_key_values if use_cache else None
        )

    def _placed(self, embedded: Tensor, position_ids: Tensor) -> Tensor:
        """Embeddings [B,L,H] with those of both positions [B,2,L] added."""
        check_positions(position_ids, self.config.max_position_embeddings)
        first, second = position_ids.unbind(1)
        return embedded + self.position_embeddings(first) + self.block_position_embeddings(second)


def _cached_tokens(cache: Cache | None) -> int:
    if cache is not None and cache.is_compileable:
        raise ValueError("GLM's masks need a cache that grows: use transformers' DynamicCache")
    return 0 if cache is None else cache.get_seq_length()
