"""Tiny models, a tokenizer without files, and padded batches for the tests of mtkd.models."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mtkd.config import ModelConfig
from mtkd.data.batch import NO_LABEL, Batch
from mtkd.models.info import CAUSAL_LM, CLASSIFIER, MASKED_LM
from mtkd.models.load import build_model
from mtkd.models.request import ModelRequest
from mtkd.models.taps import TappedModel

NUM_IDS = 61
LENGTHS = (9, 4, 7)
LM_OF = {
    "bert": MASKED_LM,
    "roberta": MASKED_LM,
    "distilbert": MASKED_LM,
    "gpt2": CAUSAL_LM,
    "llama": CAUSAL_LM,
    "qwen2": CAUSAL_LM,
    "glm_blocklm": CAUSAL_LM,
}
ARCHITECTURES = tuple(LM_OF)
EVERY_HEAD = [(a, c) for a in ARCHITECTURES for c in (LM_OF[a], CLASSIFIER)]


def tokenizer() -> PreTrainedTokenizerFast:
    """61 words; <pad> is id 1, as in RoBERTa."""
    words = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"] + [f"w{i}" for i in range(NUM_IDS - 5)]
    core = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def description(architecture: str, layers: int = 3, **fields: object) -> ModelConfig:
    """A fresh model, by default of width 24 with 4 heads; llama and qwen2 group their keys in 2."""
    grouped = {"kv_heads": 2} if architecture in ("llama", "qwen2") else {}
    shape = {"layers": layers, "width": 24, "heads": 4, **grouped, **fields}
    return ModelConfig.model_validate({"architecture": architecture, **shape})


def build(
    config: ModelConfig | str,
    auto_class: str,
    *,
    seed: int = 0,
    num_ids: int = NUM_IDS,
    num_labels: int = 3,
    label_names: tuple[str, ...] = (),
    max_positions: int = 16,
) -> PreTrainedModel:
    """`build_model` with the bank's tokenizer and paths as they are."""
    labels = num_labels if auto_class == CLASSIFIER else 0
    request = ModelRequest(auto_class, num_ids, max_positions, tokenizer(), Path, labels, label_names, seed=seed)
    return build_model(ModelConfig(path=config) if isinstance(config, str) else config, request)


def lively(model: PreTrainedModel, seed: int = 3) -> PreTrainedModel:
    """Fresh weights are so small that many mistakes would hide; noise on every parameter, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


def tapped(architecture: str, auto_class: str, **fields: object) -> TappedModel:
    return TappedModel(lively(build(description(architecture, **fields), auto_class)), auto_class, NUM_IDS).eval()


def reference(model: TappedModel, auto_class: str) -> PreTrainedModel:
    """The same weights in transformers' own eager attention, without any of our taps."""
    config = copy.deepcopy(model.model.config)
    plain = getattr(transformers, auto_class).from_config(config, attn_implementation="eager")
    plain.load_state_dict(model.model.state_dict())
    return plain.eval()


def batch(lengths: tuple[int, ...] = LENGTHS, *, width: int | None = None, seed: int = 1, types: bool = False) -> Batch:
    """Right-padded rows of random words; token types 0 0 .. 1 1 if asked."""
    size = width or max(lengths)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, NUM_IDS, (len(lengths), size), generator=generator)
    mask = torch.arange(size) < torch.tensor(lengths)[:, None]
    kinds = (torch.arange(size) >= 2).long().expand(len(lengths), size) * mask if types else None
    return Batch(torch.arange(len(lengths)), tokens.where(mask, 1), mask, torch.full_like(tokens, NO_LABEL), kinds)


def row(source: Batch, i: int) -> Batch:
    """Row i alone, its padding cut off."""
    n = int(source.attention_mask[i].sum())
    types = None if source.token_type_ids is None else source.token_type_ids[i : i + 1, :n]
    return Batch(
        source.keys[i : i + 1],
        source.input_ids[i : i + 1, :n],
        source.attention_mask[i : i + 1, :n],
        source.targets[i : i + 1, :n],
        types,
    )
