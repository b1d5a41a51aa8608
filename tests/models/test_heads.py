"""Whether a folder has the head of a task is read off the names of its weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_bank import LENGTHS, LM_OF, NUM_IDS, build, description, tokenizer
from safetensors.torch import load_file, save_file
from tiny import class_batch, rows_of
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from mtkd.errors import DataError
from mtkd.models.heads import check_heads, find_heads, padding_id
from mtkd.models.info import CLASSIFIER
from mtkd.models.taps import TappedModel

DECODERS = ("gpt2", "llama", "qwen2")
WANTS = frozenset({"logits"})


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, str], Path]:
    """Save a model of an architecture and give its folder."""

    def save(architecture: str, auto_class: str) -> Path:
        folder = tmp_path / f"{architecture}-{auto_class}"
        build(description(architecture), auto_class).save_pretrained(folder)
        return folder

    return save


def head(folder: Path, auto_class: str):

    found = find_heads(AutoConfig.from_pretrained(folder), auto_class, folder)
    assert found is not None
    return found["logits"]


@pytest.mark.parametrize("architecture", list(LM_OF))
@pytest.mark.parametrize("written", ["as it is", "every head", "none"])
def test_the_weights_decide_and_never_what_architectures_says(
    saved: Callable[..., Path], architecture: str, written: str
) -> None:
    """A classifier has a classifier's head, a language model and a plain encoder have none."""
    for made, whole in ((CLASSIFIER, True), (LM_OF[architecture], False), ("AutoModel", False)):
        source = saved(architecture, CLASSIFIER if made == "AutoModel" else made)
        if made == "AutoModel":
            AutoModel.from_pretrained(source).save_pretrained(source)
        config = json.loads((source / "config.json").read_text())
        said = {"every head": ["BertForSequenceClassification"], "none": None}
        config["architectures"] = said.get(written, config["architectures"])
        (source / "config.json").write_text(json.dumps(config))
        assert head(source, CLASSIFIER).whole is whole
        assert head(source, CLASSIFIER).absent is not whole


@pytest.mark.parametrize("architecture", list(LM_OF))
def test_a_language_models_head_is_there_tied_or_not(saved: Callable[..., Path], architecture: str) -> None:
    assert head(saved(architecture, LM_OF[architecture]), LM_OF[architecture]).whole


@pytest.mark.parametrize("architecture", ["bert", "roberta", "distilbert"])
def test_an_encoder_has_no_head_of_masked_tokens(saved: Callable[..., Path], architecture: str) -> None:
    assert head(saved(architecture, CLASSIFIER), LM_OF[architecture]).absent


def test_names_of_older_files_count(saved: Callable[..., Path]) -> None:
    """bert-base's published files call the parts of a norm gamma and beta, and know the encoder by its prefix."""
    folder = saved("bert", LM_OF["bert"])
    weights = load_file(folder / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): w
           for n, w in weights.items()}  # fmt: skip
    save_file(old, folder / "model.safetensors", {"format": "pt"})
    assert head(folder, LM_OF["bert"]).whole


def test_one_missing_weight_is_enough(saved: Callable[..., Path]) -> None:
    """A teacher whose logits are read needs all, one that is matched inside needs none, a student all or none."""
    folder = saved("roberta", CLASSIFIER)
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.out_proj.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    heads = {"logits": head(folder, CLASSIFIER)}
    check_heads(heads, folder, "t", reads=frozenset(), new=False)
    with pytest.raises(DataError, match="no trained head"):
        check_heads(heads, folder, "t", reads=WANTS, new=True)
    with pytest.raises(DataError, match="missing"):
        check_heads(heads, folder, "t", reads=None, new=True)


@pytest.mark.parametrize("architecture", DECODERS)
@pytest.mark.parametrize("pad", [None, 1, 7])
def test_a_decoders_classifier_reads_the_last_token_of_every_row(architecture: str, pad: int | None) -> None:
    """In a batch as alone, however much padding there is, with a padding token or without (7: a word's)."""
    model = build(description(architecture), CLASSIFIER)
    model.config.pad_token_id = pad
    tapped, batch = TappedModel(model, CLASSIFIER, NUM_IDS), class_batch(LENGTHS)
    batch.input_ids[batch.attention_mask & (batch.input_ids == 7)] = 8
    with torch.no_grad():
        together = tapped(batch, WANTS)["logits"].rows(torch.arange(len(LENGTHS)))
        for row in range(len(LENGTHS)):
            alone = rows_of(batch, [row])
            plain = model(input_ids=alone.input_ids).logits
            torch.testing.assert_close(
                tapped(alone, WANTS)["logits"].rows(torch.arange(1)), plain, rtol=1e-4, atol=1e-6
            )
            torch.testing.assert_close(together[row : row + 1], plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", DECODERS)
def test_a_decoders_export_batches_in_plain_transformers(architecture: str, tmp_path: Path) -> None:
    """Its config.json has a padding id that stands in no text, also where the tokenizer has no padding token."""
    plain_tokenizer = tokenizer()
    plain_tokenizer.pad_token = None
    pad = padding_id(plain_tokenizer)
    assert pad == plain_tokenizer.eos_token_id
    made = build(description(architecture), CLASSIFIER)
    made.config.pad_token_id = pad
    tapped, batch = TappedModel(made, CLASSIFIER, NUM_IDS), class_batch(LENGTHS)
    batch.input_ids[batch.attention_mask & (batch.input_ids == pad)] = 9
    batch.input_ids[~batch.attention_mask] = pad
    made.save_pretrained(tmp_path)
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long()).logits
        ours = tapped(batch, WANTS)["logits"].rows(torch.arange(len(LENGTHS)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
