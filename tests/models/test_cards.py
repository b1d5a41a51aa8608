"""The teacher cards, counted on the meta device; GLM's by formula too."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    PretrainedConfig,
    Qwen2Config,
    RobertaConfig,
)

from mtkd.config import ModelConfig
from mtkd.errors import DataError
from mtkd.models import cards
from mtkd.models.cards import load_cards
from mtkd.models.glm import GLMConfig
from mtkd.models.numbers import count_parameters
from mtkd.planning.locate import revision_of

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# The published configurations, written down from the models' own pages.
PUBLISHED: dict[str, tuple[PretrainedConfig, str]] = {
    "bert-base": (BertConfig(), "AutoModel"),
    "bert-large": (BertConfig(**LARGE), "AutoModel"),
    "roberta-large": (
        RobertaConfig(**LARGE, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
        "AutoModel",
    ),
    "minilm": (
        BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        "AutoModel",
    ),
    "distilbert-base": (DistilBertConfig(), "AutoModel"),
    "gpt2": (GPT2Config(), "AutoModelForCausalLM"),
    "qwen2.5-7b": (
        Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
            tie_word_embeddings=False,
        ),
        "AutoModelForCausalLM",
    ),
}
SMALL, LARGE_ONES = ("glm-base", "glm-large", "glm-410m", "glm-515m"), ("glm-2b", "glm-10b")
GLM_POSITIONS = {**dict.fromkeys(SMALL, 512), **dict.fromkeys(LARGE_ONES, 1024)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_card_agrees_with_the_architecture(name: str) -> None:
    card = load_cards()[name]
    config, auto_class = PUBLISHED[name]
    assert count_parameters(config, auto_class) == card.parameters
    assert card.architecture == config.model_type
    found = (config.vocab_size, config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert found == (card.vocabulary, card.layers, card.width, card.heads)


@pytest.mark.parametrize("name", GLM_POSITIONS)
def test_glm_parameters_by_formula_and_by_model(name: str) -> None:
    """Tied embedding, two position tables of one row more, 12 h^2 + 13 h per layer, the final normalisation."""
    card, h = load_cards()[name], load_cards()[name].width
    tables = card.vocabulary * h + 2 * (GLM_POSITIONS[name] + 1) * h
    assert tables + card.layers * (12 * h * h + 13 * h) + 2 * h == card.parameters
    config = GLMConfig(
        vocab_size=card.vocabulary,
        hidden_size=h,
        num_hidden_layers=card.layers,
        num_attention_heads=card.heads,
        max_position_embeddings=GLM_POSITIONS[name],
    )
    for auto_class in ("AutoModel", "AutoModelForCausalLM"):
        assert count_parameters(config, auto_class) == card.parameters
    assert card.architecture == config.model_type  # not transformers' "glm", which is GLM-4
    assert card.vocabulary % 128 == 0


def test_every_card() -> None:
    known = load_cards()
    assert set(PUBLISHED) | set(GLM_POSITIONS) == set(known)
    for name, card in known.items():
        assert card.name == name
        assert card.homepage.startswith("https://")
        assert card.paper.startswith("https://")
        assert card.width % card.heads == 0
    assert known["glm-10b"].parameters == 9_880_682_496
    assert known["qwen2.5-7b"].memory_gb == 15.23  # 7.6156e9 parameters x 2 bytes
    assert known["bert-base"].memory_gb == 0.44  # 0.10948e9 parameters x 4 bytes


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [("layers: 12", "layers: -1", "layers"), ("licence:", "license:", "license"), ("bert-base", "other", "name")],
)
def test_a_bad_card_names_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, new: str, reason: str
) -> None:
    text = (cards._folder() / "bert-base.yaml").read_text()
    assert old in text
    (tmp_path / "bert-base.yaml").write_text(text.replace(old, new))
    monkeypatch.setattr(cards, "_folder", lambda: tmp_path)
    with pytest.raises(DataError, match=reason) as error:
        load_cards()
    assert "bert-base.yaml" in str(error.value)


def test_the_revision_that_identifies_a_model_is_the_card_s_unless_one_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (cards._folder() / "bert-base.yaml").read_text()
    (tmp_path / "bert-base.yaml").write_text(text + "revision: v7\n")
    monkeypatch.setattr(cards, "_folder", lambda: tmp_path)

    assert revision_of(ModelConfig(path="bert-base")) == "v7"
    assert revision_of(ModelConfig(path="bert-base", revision="v8")) == "v8"
    assert revision_of(ModelConfig(path="some/model")) is None
