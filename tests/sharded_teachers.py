"""Small teachers in folders, sharded over the ranks of a group and resident beside it: what the ranks of tests do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny import CPU, NUM_IDS, causal_batch, causal_model, class_batch, classifier, rows_of
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from mtkd.config import ModelConfig, ShardedConfig, teacher_config
from mtkd.data.batch import Batch
from mtkd.engine.dist import Dist
from mtkd.models.create import seeded
from mtkd.models.features import Features
from mtkd.models.glm import GLMConfig, GLMForConditionalGeneration
from mtkd.models.load import build_model
from mtkd.models.request import ModelRequest
from mtkd.models.taps import TappedModel
from mtkd.pool import ShardedModel, shard

CAUSAL, MASKED, CLASSES = "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"
HEADS = {
    "untied": CAUSAL,
    "tied": CAUSAL,
    "padded": CAUSAL,
    "gpt2": CAUSAL,
    "glm": CAUSAL,
    "bert": MASKED,
    "classes": CLASSES,
}


def write_models(folder: Path) -> None:
    """One folder per name of `HEADS`, safetensors in several shards; weights far from zero, biases and norms too."""
    with seeded(0):
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
        rates = ("embedding_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob")
        glm = GLMConfig(
            vocab_size=NUM_IDS + 3, hidden_size=24, max_position_embeddings=32, **shape, **dict.fromkeys(rates, 0.0)
        )
        bert = BertConfig(vocab_size=NUM_IDS, hidden_size=16, intermediate_size=32, max_position_embeddings=32, **shape)
        gpt2 = GPT2Config(vocab_size=NUM_IDS, n_embd=20, n_layer=2, n_head=4, n_positions=32, pad_token_id=0)
        models = {
            "untied": causal_model(16, 2, 1).model,
            "tied": causal_model(32, 3, 2, tied=True).model,
            "padded": causal_model(24, 2, 3, padded=3).model,
            "gpt2": GPT2LMHeadModel(gpt2),
            "glm": GLMForConditionalGeneration(glm),
            "bert": BertForMaskedLM(bert),
            "classes": classifier(16, 2, 4).model,
        }
    generator = torch.Generator().manual_seed(5)
    for name, model in models.items():
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name, max_shard_size="8KB")


def resident(folder: Path, name: str) -> TappedModel:
    """A teacher as the resident backend loads it."""
    model = build_model(ModelConfig(path=str(folder / name)), _request(name))
    return TappedModel(model, HEADS[name], NUM_IDS)


def sharded(folder: Path, name: str, dist: Dist, half: bool = False, **config: Any) -> ShardedModel:
    """The same teacher with a part on every rank."""
    path = str(folder / name)
    empty = build_model(ModelConfig(path=path), _request(name), empty=True)
    teacher = teacher_config(
        {"name": name, "model": ModelConfig(path=path), "backend": "sharded", "sharded": ShardedConfig(**config)}
    )
    dtype = torch.bfloat16 if half else torch.float32
    return shard(TappedModel(empty, HEADS[name], NUM_IDS), folder / name, teacher, CPU, dtype, dist, "teachers[0]")


def _request(name: str) -> ModelRequest:
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0})()
    labels = 3 if HEADS[name] == CLASSES else 0
    return ModelRequest(HEADS[name], NUM_IDS, max_positions=16, tokenizer=tokenizer, num_labels=labels)


def batch_of(name: str, rank: int) -> Batch:
    """Other lengths on every rank; the third rank's call of a step may be filler rows alone."""
    lengths = [[9, 1, 2, 1], [2], [7, 3]][rank % 3]
    return class_batch(lengths) if HEADS[name] == CLASSES else causal_batch(lengths, seed=rank)


def filler(batch: Batch) -> Batch:
    """No row that counts."""
    return rows_of(batch, [])


def wants(model: TappedModel | ShardedModel) -> frozenset[str]:
    """Every feature of every layer."""
    info = model.info
    layered = [n for n in info.taps if n not in ("logits", "nsp_logits", "embedding")]
    keys = {f"{name}.{layer}" for name in layered for layer in range(1, info.num_layers + 1)}
    return frozenset(keys | (info.taps & {"logits", "embedding"}))


def values(features: Features, positions: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Everything as tensors; logits at the first positions as the objective reads them: cast, in tiles."""
    found = {}
    for key, value in features.items():
        if not isinstance(value, Tensor):
            tiles = torch.arange(positions).split(2)
            value = torch.cat([value.in_dtype(dtype).rows(index) for index in tiles])
        found[key] = value
    return found


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Over all features, relative to each one's largest number; masked scores are -inf on both sides."""
    assert ours.keys() == theirs.keys()
    worst = 0.0
    for key, value in theirs.items():
        finite = value.isfinite()
        assert torch.equal(finite, ours[key].isfinite()), key
        scale = value[finite].abs().max().clamp_min(1e-6)
        worst = max(worst, float((ours[key][finite] - value[finite]).abs().max() / scale))
    return worst


def held_numbers_after(model: ShardedModel) -> int:
    """Numbers that a closed model still has here."""
    return sum(p.data.numel() for p in model.parameters())


def held_numbers(model: ShardedModel) -> tuple[int, int]:
    """Numbers of this rank's parts, and of parameters that are whole now; a tied one once."""
    parameters: Sequence[Any] = list(model.parameters())
    return sum(p.ds_tensor.numel() for p in parameters), sum(p.data.numel() for p in parameters)
