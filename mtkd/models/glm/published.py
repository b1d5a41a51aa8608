"""What is known of the published GLMs without their weights: ids of their vocabularies, shapes from their cards."""

from __future__ import annotations

from typing import Any

from mtkd.models.cards import Card
from mtkd.models.glm.configuration import GLMConfig

IDS = {
    50304: {"pad_token_id": 50256, "sop_token_id": 50257, "eos_token_id": 50258, "mask_token_id": 50260},
    30592: {"pad_token_id": 0, "sop_token_id": 30522, "eos_token_id": 30523, "mask_token_id": 103},
}
"""Ids by padded size of the vocabulary: `mtkd.data.glm_tokens` builds the tokenizers."""


def config_of_card(card: Card) -> GLMConfig:
    """The configuration that `mtkd convert-glm` would write for a published model, as far as a card tells."""
    assert card.positions is not None, "cards of GLM have it"
    ids: dict[str, Any] = {**IDS[card.vocabulary]}
    return GLMConfig(
        vocab_size=card.vocabulary,
        hidden_size=card.width,
        num_hidden_layers=card.layers,
        num_attention_heads=card.heads,
        max_position_embeddings=card.positions,
        architectures=["GLMForConditionalGeneration"],
        **ids,
    )
