"""What a configuration alone tells about a model."""

from __future__ import annotations

import pytest
from model_bank import ARCHITECTURES, EVERY_HEAD, LM_OF, NUM_IDS, build, description
from transformers import (
    BertConfig,
    DebertaV2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    RobertaConfig,
    T5Config,
)

from mtkd.errors import UserError
from mtkd.models.features import ATTENTION
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM, ModelInfo, model_info
from mtkd.models.numbers import count_parameters


@pytest.mark.parametrize(("architecture", "auto_class"), EVERY_HEAD)
def test_info_of_every_architecture(architecture: str, auto_class: str) -> None:
    info = model_info(build(description(architecture), auto_class).config, auto_class)
    grouped = architecture in ("llama", "qwen2")
    assert info == ModelInfo(
        architecture=architecture,
        num_layers=3,
        width=24,
        num_heads=4,
        num_kv_heads=2 if grouped else 4,
        head_width=6,
        vocabulary=NUM_IDS,
        num_labels=3 if auto_class == CLASSIFIER else 0,
        max_positions=16,
        causal=architecture in ("gpt2", "llama", "qwen2") or (architecture, auto_class) == ("glm_blocklm", CAUSAL_LM),
        taps=frozenset({"logits", "hidden", "embedding", "cls", *ATTENTION}),
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_count_is_that_of_the_built_model(architecture: str) -> None:
    for tie in (True, False):
        model = build(description(architecture, tie_embeddings=tie), LM_OF[architecture])
        distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
        assert count_parameters(model.config, LM_OF[architecture]) == sum(distinct.values())


def test_tied_weights_count_once() -> None:
    tied, untied = (
        count_parameters(LlamaConfig(num_hidden_layers=1, tie_word_embeddings=tie), CAUSAL_LM) for tie in (True, False)
    )
    assert untied - tied == 32000 * 4096


@pytest.mark.parametrize(
    ("config", "auto_class", "attention"),
    [
        (DebertaV2Config(), MASKED_LM, False),
        (Gemma2Config(), CAUSAL_LM, False),  # capped scores
        (Qwen3NextConfig(), CAUSAL_LM, False),  # layers that are not attention
        (MistralConfig(), CAUSAL_LM, True),
        (BertConfig(is_decoder=True), CAUSAL_LM, True),
    ],
)
def test_attention_features_only_through_the_interface(
    config: PretrainedConfig, auto_class: str, attention: bool
) -> None:
    taps = model_info(config, auto_class).taps
    assert {"logits", "hidden", "embedding", "cls"} <= taps
    assert (set(ATTENTION) & taps) == (set(ATTENTION) if attention else set())


def test_roberta_positions_start_after_the_pad_token() -> None:
    assert model_info(RobertaConfig(max_position_embeddings=514, pad_token_id=1), MASKED_LM).max_positions == 512


def test_a_decoder_is_causal_with_any_head() -> None:
    assert model_info(GPT2Config(), CLASSIFIER).causal
    assert not model_info(BertConfig(), CLASSIFIER).causal


@pytest.mark.parametrize(
    ("config", "auto_class", "message"),
    [
        (BertConfig(), CAUSAL_LM, "attends in both directions"),
        (LlamaConfig(), MASKED_LM, "no model for this task"),
        (T5Config(), CLASSIFIER, "plain encoders and decoders"),
    ],
)
def test_a_head_that_does_not_fit(config: PretrainedConfig, auto_class: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        model_info(config, auto_class)
