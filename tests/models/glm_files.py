"""Published GLM checkpoints and plain vocabularies as files, written out name by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from glm_bank import small_model
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from torch import Tensor

Weights = dict[str, Tensor]
WIDTH = 24


def originals(dtype: torch.dtype = torch.float16) -> tuple[torch.nn.Module, Weights]:
    """A model and its weights under the names of the original's training code."""
    model = small_model().to(dtype)
    w = model.state_dict()
    found = {
        "word_embeddings.weight": w["glm.word_embeddings.weight"],
        "transformer.position_embeddings.weight": w["glm.position_embeddings.weight"],
        "transformer.block_position_embeddings.weight": w["glm.block_position_embeddings.weight"],
    }
    for i in range(3):
        for module in ("input_layernorm", "post_attention_layernorm"):
            for kind in ("weight", "bias"):
                found[f"transformer.layers.{i}.{module}.{kind}"] = w[f"glm.layers.{i}.{module}.{kind}"]
        for module in ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"):
            for kind in ("weight", "bias"):
                found[f"transformer.layers.{i}.{module}.{kind}"] = w[f"glm.layers.{i}.{module}.{kind}"]
    for kind in ("weight", "bias"):
        found[f"transformer.final_layernorm.{kind}"] = w[f"glm.final_layernorm.{kind}"]
    return model, {name: value.clone() for name, value in found.items()}


def swiss(weights: Weights) -> Weights:
    """SwissArmyTransformer's names."""
    renamed = {
        "word_embeddings.weight": "transformer.word_embeddings.weight",
        "transformer.block_position_embeddings.weight": (
            "mixins.block_position_embedding.block_position_embeddings.weight"
        ),
    }
    return {renamed.get(name, name): value for name, value in weights.items()}


def split(weights: Weights, ranks: int) -> list[Weights]:
    """What each of some model-parallel ranks keeps: whole heads, some units of the feed-forward layer, some ids."""
    parts: list[Weights] = [{} for _ in range(ranks)]
    for name, value in weights.items():
        for r, part in enumerate(parts):
            if "query_key_value" in name:
                share = WIDTH // ranks
                thirds = [value[k * WIDTH : (k + 1) * WIDTH] for k in range(3)]
                part[name] = torch.cat([third[r * share : (r + 1) * share] for third in thirds])
            elif name == "word_embeddings.weight" or "dense_h_to_4h" in name:
                share = len(value) // ranks
                part[name] = value[r * share : (r + 1) * share].clone()
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                share = value.shape[1] // ranks
                part[name] = value[:, r * share : (r + 1) * share].clone()
            else:
                part[name] = value.clone()
    return parts


def random_states() -> dict[str, object]:
    """What training checkpoints hold beside the weights."""
    numpy_state = np.random.RandomState(1).get_state()
    return {"iteration": 5, "np_rng_state": numpy_state, "torch_rng_state": torch.get_rng_state(), "optimizer": None}


def write(folder: Path, form: str, weights: Weights) -> Path:
    """A folder of one of the forms."""
    folder.mkdir()
    if form in ("original", "swiss"):
        module = swiss(weights) if form == "swiss" else weights
        torch.save({"module": module, **random_states()}, folder / "mp_rank_00_model_states.pt")
    elif form.startswith("parts"):
        for rank, part in enumerate(split(weights, int(form[-1]))):
            torch.save({"module": part, **random_states()}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    elif form == "hub":
        torch.save({f"glm.{name}": value for name, value in weights.items()}, folder / "pytorch_model.bin")
    elif form == "hub without prefix":
        torch.save(weights, folder / "pytorch_model.bin")
    elif form == "hub safetensors":
        save_file(weights, folder / "model.safetensors")
    else:
        names = list(weights)
        files = {"pytorch_model-00001-of-00002.bin": names[:10], "pytorch_model-00002-of-00002.bin": names[10:]}
        for file, some in files.items():
            torch.save({name: weights[name] for name in some}, folder / file)
        places = {name: file for file, some in files.items() for name in some}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


MERGES = [("t", "h"), ("th", "e"), ("Ġ", "c"), ("Ġc", "a"), ("Ġca", "t"), ("o", "n")]
WORDS = ["the", "cat", "sat", "on", "##s", "mat", ".", "a"]


def gpt2_files(folder: Path, size: int = 0) -> tuple[Path, Path]:
    """Every byte, some merges, <|endoftext|> last; filled up to `size` entries."""
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in MERGES]
    tokens += [f"filler{i}" for i in range(size - len(tokens) - 1)] + ["<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in MERGES))
    return folder / "vocab.json", folder / "merges.txt"


def bert_file(folder: Path, size: int = 0) -> Path:
    """[PAD] first and the others from 100 on, as in BERT's own; filled up to `size` entries."""
    tokens = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokens += ["\u2028", "\x85"]  # line ends to some, tokens of BERT's
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    return folder / "vocab.txt"
