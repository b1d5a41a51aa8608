"""The configuration of a GLM of 2022 (blank infilling), under its own type; transformers' "glm" is GLM-4."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PretrainedConfig

from mtkd.models.info import GLM

ORIGINAL_ACTIVATION, HUB_ACTIVATION = "gelu_pytorch_tanh", "gelu"
"""The original multiplies with the tanh form of GELU, the hub port (THUDM/glm-* with remote code) with the erf form."""


@strict
class GLMConfig(PretrainedConfig):
    """Shape of a GLM; the defaults are those of GLM-base.

    Attributes:
        vocab_size: rows of the tied embedding, padding included.
        intermediate_size: feed-forward width; default: 4 x `hidden_size`.
        max_position_embeddings: longest part A; both position tables have one row more.
        hidden_act: "gelu_pytorch_tanh" for the original's numbers, "gelu" for the hub port's (pointwise 4.7e-4 apart).
        embedding_dropout_prob, hidden_dropout_prob, attention_probs_dropout_prob: shares while training.
        initializer_range: standard deviation of fresh weights; output projections have it over sqrt(2 x layers).
        sop_token_id, mask_token_id: ids of <|startofpiece|> and [MASK]; a cloze classifier needs them.
        verbalizers: token ids of each class's words, in the order of the classes; makes a sequence classifier a cloze.
        eop_token_id: id of <|endofpiece|>, which ends the words where a class has several; by default `eos_token_id`,
            which is that of a GLM. A folder that has such words and not this key was trained without it: the default
            does not hold there, and the cloze is refused.

    Source: Du et al. 2022, GLM, arXiv 2103.10360, section 2.
    """

    model_type = GLM
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012  transformers' interface

    vocab_size: int = 30592
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int | None = None
    max_position_embeddings: int = 512
    hidden_act: str = ORIGINAL_ACTIVATION
    embedding_dropout_prob: float | int = 0.1
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    sop_token_id: int | None = None
    mask_token_id: int | None = None
    verbalizers: list[list[int]] | None = None
    eop_token_id: int | None = None
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:  # transformers' interface
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(f"{self.num_attention_heads} heads do not divide a width of {self.hidden_size}")
        self.end_answers()
        super().__post_init__(**kwargs)

    def end_answers(self) -> None:
        """Answers of several tokens end with the end of a piece."""
        if self.eop_token_id is None and self.has_long_answers and isinstance(self.eos_token_id, int):
            self.eop_token_id = self.eos_token_id

    @property
    def has_long_answers(self) -> bool:
        """Whether any class is answered by several tokens: then the answers need an end."""
        return any(len(words) > 1 for words in self.verbalizers or ())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # transformers' interface
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if config_dict.get("eop_token_id") is None and config_dict.get("verbalizers") and config.has_long_answers:
            config.eop_token_id = None  # made when answers had no end
        return loaded
