"""GLM with its tied output head, and `generate()`: prompts with a blank are filled as the published models do it.

Source: Du et al. 2022, GLM, arXiv 2103.10360, section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from mtkd.models.glm.configuration import GLMConfig
from mtkd.models.glm.inputs import Sep, default_positions, next_positions, split_mask, two_rows
from mtkd.models.glm.model import GLMModel, GLMPreTrainedModel


class GLMForConditionalGeneration(GLMPreTrainedModel, GenerationMixin):
    """GLM as a language model: logits = LN(x_N) E^T with the table of the tokens, without a bias."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}  # noqa: RUF012  transformers' interface

    def __init__(self, config: GLMConfig) -> None:
        super().__init__(config)
        self.glm = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,  # [B,L]
        position_ids: Tensor | None = None,  # [B,2,L]
        attention_mask: Tensor | None = None,
        sep: Sep = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,  # [B,L,H]
        labels: Tensor | None = None,  # [B,L]
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,  # transformers' interface: use_cache, output_hidden_states and the like
    ) -> CausalLMOutputWithPast:
        """Logits [B,L,V]; positions, masks and `sep` as in `GLMModel.forward`.

        Args:
            labels: what each position predicts, -100 where nothing is asked. **Not shifted** inside, unlike those of
                transformers' causal models: GLM's targets (t1 .. tn, end of piece) stand under their inputs
                (start of piece, t1 .. tn).
        """
        output = self.glm(
            input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            sep=sep,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])  # a slice from -0 is everything
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """transformers' `generate`; also takes `sep`, or `attention_mask` in its place, and positions [B,2,L].

        A prompt that ends in a piece (its last pos2 is 1: <|startofpiece|>) is continued inside it: pos1 stays, pos2
        grows. Any other prompt is continued as plain text. Unequal prompts are padded on the left, with a mask [B,L];
        `mtkd.models.glm.blank_prompts` makes such inputs.
        """
        mask, sep = split_mask(kwargs.pop("attention_mask", None), kwargs.pop("sep", None))
        if mask is not None:
            kwargs["attention_mask"] = mask
        if sep is not None:
            kwargs["sep"] = int(sep) if isinstance(sep, Tensor) and sep.numel() == 1 else sep
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = two_rows(kwargs["position_ids"])
        return super().generate(inputs, **kwargs)  # type: ignore[misc]

    def _prepare_attention_mask_for_generation(  # type: ignore[override]
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """Without a mask every token is real: the end of a prompt is the padding's token too, and no padding."""
        return torch.ones(inputs_tensor.shape[:2], dtype=torch.long, device=inputs_tensor.device)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        mask, cache = model_kwargs.get("attention_mask"), model_kwargs.get("past_key_values")
        length = inputs_tensor.shape[1] + (0 if cache is None or mask is not None else cache.get_seq_length())
        length = length if mask is None else mask.shape[1]
        positions = default_positions(mask, queries=length, keys=length, device=inputs_tensor.device)
        return positions.expand(inputs_tensor.shape[0], -1, -1)

    def _expand_inputs_for_generation(  # type: ignore[override]
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,  # transformers' interface
    ) -> tuple[Tensor | None, dict[str, Any]]:
        # three dimensions of positions mean [3,B,L] to transformers
        positions = model_kwargs.pop("position_ids", None)
        expand: Any = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, model_kwargs = expand(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        if positions is not None:
            model_kwargs["position_ids"] = positions.repeat_interleave(expand_size, dim=0)
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        positions = model_kwargs.pop("position_ids", None)
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if positions is not None:
            more = next_positions(positions, num_new_tokens)
            model_kwargs["position_ids"] = torch.cat([positions, more], -1)
        return model_kwargs
