"""A small GLM with lively weights, and its architecture written out once more, row by row and head by head."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mtkd.models.create import seeded
from mtkd.models.glm import GLMConfig, GLMForConditionalGeneration

SHAPE = {"vocab_size": 70, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
POSITIONS = 20
MASK, SOP, EOP, PAD = 64, 65, 66, 67


def small_config(**fields: object) -> GLMConfig:
    named = {"pad_token_id": PAD, "eos_token_id": EOP, "sop_token_id": SOP, "mask_token_id": MASK}
    drops = dict.fromkeys(("embedding_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return GLMConfig(**{**SHAPE, "max_position_embeddings": POSITIONS, **named, **drops, **fields})


def noisy(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Noise on every parameter: fresh weights are so small that many mistakes would hide."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)
    return model.eval()


def small_model(**fields: object) -> GLMForConditionalGeneration:
    with seeded(0):
        model = GLMForConditionalGeneration(small_config(**fields)).double()
    return noisy(model)


def erf_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


GELU = {"gelu": erf_gelu, "gelu_pytorch_tanh": tanh_gelu}


def normalised(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def logits_of(
    model: GLMForConditionalGeneration, ids: list[int], positions: list[tuple[int, int]], seen: Tensor
) -> Tensor:
    """Logits [L,V] of one row, float64.

    Args:
        positions: (pos1, pos2) of each token. seen: [L,L], True where the row's token sees the column's.
    """
    w = {name.removeprefix("glm."): value.double() for name, value in model.state_dict().items()}
    heads, gelu = model.config.num_attention_heads, GELU[model.config.hidden_act]
    first, second = [p for p, _ in positions], [b for _, b in positions]
    x = w["word_embeddings.weight"][ids] + w["position_embeddings.weight"][first]
    x = x + w["block_position_embeddings.weight"][second]
    for n in range(model.config.num_hidden_layers):
        own = {name.removeprefix(f"layers.{n}."): value for name, value in w.items() if name.startswith(f"layers.{n}.")}
        a = normalised(x, own["input_layernorm.weight"], own["input_layernorm.bias"])
        joined = a @ own["attention.query_key_value.weight"].T + own["attention.query_key_value.bias"]
        width = x.shape[1]
        size = width // heads
        out = torch.zeros_like(x)
        for h in range(heads):
            q, k, v = (joined[:, third * width + h * size : third * width + (h + 1) * size] for third in range(3))
            scores = (q @ k.T / math.sqrt(size)).masked_fill(~seen, -torch.inf)
            out[:, h * size : (h + 1) * size] = torch.softmax(scores, -1) @ v
        x = x + out @ own["attention.dense.weight"].T + own["attention.dense.bias"]
        m = normalised(x, own["post_attention_layernorm.weight"], own["post_attention_layernorm.bias"])
        m = gelu(m @ own["mlp.dense_h_to_4h.weight"].T + own["mlp.dense_h_to_4h.bias"])
        x = x + m @ own["mlp.dense_4h_to_h.weight"].T + own["mlp.dense_4h_to_h.bias"]
    x = normalised(x, w["final_layernorm.weight"], w["final_layernorm.bias"])
    return x @ w["word_embeddings.weight"].T


def prefix(length: int, sep: int) -> Tensor:
    """[L,L]: j <= i or j < sep."""
    return torch.tensor([[j <= i or j < sep for j in range(length)] for i in range(length)])


def block_positions(length: int, sep: int, at: int) -> list[tuple[int, int]]:
    """Part A counted from 0, then one piece that fills the blank at `at`."""
    return [(i, 0) if i < sep else (at, i - sep + 1) for i in range(length)]


Row = tuple[list[int], int, int]


def rows() -> list[Row]:
    """(token ids, tokens of part A, place of the blank) of three examples of unequal length."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(9, 6, 2), (5, 4, 1), (7, 3, 0)]
    return [(torch.randint(0, 60, (n,), generator=generator).tolist(), sep, at) for n, sep, at in shapes]


def padded(examples: list[Row], side: str) -> tuple[Tensor, Tensor, Tensor, list[slice]]:
    """Ids [B,L], positions [B,2,L] and mask [B,L] of examples padded on one side, and where each stands in its row."""
    width = max(len(ids) for ids, _, _ in examples)
    ids = torch.full((len(examples), width), PAD)
    positions, mask = torch.zeros(len(examples), 2, width, dtype=torch.int64), torch.zeros(len(examples), width).long()
    places = []
    for row, (tokens, sep, at) in enumerate(examples):
        start = 0 if side == "right" else width - len(tokens)
        place = slice(start, start + len(tokens))
        ids[row, place] = torch.tensor(tokens)
        positions[row, :, place] = torch.tensor(block_positions(len(tokens), sep, at)).T
        mask[row, place] = 1
        places.append(place)
    return ids, positions, mask, places
