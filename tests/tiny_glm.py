"""Tiny GLMs, a tokenizer with GLM's commands, and data for GLM's tasks: made in code, no downloads."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mtkd.config import DataConfig
from mtkd.data.glm_tokens import END, START, trained_tokenizer
from mtkd.data.load import load_data
from mtkd.data.raw import Raw
from mtkd.data.split import Split
from mtkd.models.create import seeded
from mtkd.models.glm import GLMConfig, GLMForConditionalGeneration, GLMForSequenceClassification
from mtkd.models.taps import TappedModel

LONGEST = 48
CLOZE = {
    "task": "glm-cloze",
    "cloze": "{text} It was [MASK].",
    "verbalizers": {"good": " warm day", "bad": " cold"},  # of several tokens and of one
}
ANSWERS = sorted(CLOZE["verbalizers"].items())
"""Class and words, in the order of the classes."""
_WORDS = {"good": ("fine", "bright", "warm", "kind", "open"), "bad": ("cold", "dark", "sour", "rude", "shut")}
_COMMON = ("the", "day", "was", "long", "and", "we", "saw", "it", "all", "from", "there")


def examples(count: int, seed: int = 0) -> dict[str, list[str]]:
    """Columns text and label: sentences with words of one class among common ones."""
    chance = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        label = chance.choice(sorted(_WORDS))
        sentences = [
            " ".join(chance.choices([*_WORDS[label], *_COMMON], k=chance.randint(4, 8))) + "."
            for _ in range(chance.randint(2, 4))
        ]
        texts.append(" ".join(sentences))
        labels.append(label)
    return {"text": texts, "label": labels}


def write_data(folder: Path) -> None:
    """train (96 rows) and test (48) as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (split, count) in enumerate((("train", 96), ("test", 48))):
        columns = examples(count, seed)
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return trained_tokenizer(examples(96)["text"], 330)


def split_of(count: int = 16, **fields: Any) -> Split:
    """The train split of a `data` block, glm-infill by default."""
    config = DataConfig(source="files", **{"task": "glm-infill", "max_length": LONGEST, **fields})
    raw = Raw({"train": Dataset.from_dict(examples(count))}, "0" * 64, "test")
    return load_data("text", config, raw, tokenizer()).splits["train"]


def _config(width: int, layers: int, **fields: Any) -> GLMConfig:
    ids = tokenizer().get_vocab()
    drops = dict.fromkeys(("embedding_dropout_prob", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    return GLMConfig(
        vocab_size=len(ids) + 6,  # padded
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=LONGEST,
        pad_token_id=tokenizer().pad_token_id,
        sop_token_id=ids[START],
        eos_token_id=ids[END],
        mask_token_id=tokenizer().mask_token_id,
        initializer_range=0.2,  # far from uniform predictions, so that losses differ visibly
        attn_implementation="mtkd_tap",
        **{**drops, **fields},
    )


def language_model(width: int, layers: int, seed: int) -> TappedModel:
    with seeded(seed):
        model = GLMForConditionalGeneration(_config(width, layers))
    return TappedModel(model, "AutoModelForCausalLM", len(tokenizer())).eval()


def cloze_model(width: int, layers: int, seed: int) -> TappedModel:
    words = [tokenizer()(text, add_special_tokens=False)["input_ids"] for _, text in ANSWERS]
    with seeded(seed):
        model = GLMForSequenceClassification(_config(width, layers, verbalizers=words, num_labels=2))
    return TappedModel(model, "AutoModelForSequenceClassification", len(tokenizer())).eval()


def values(folder: Path, **data: Any) -> dict[str, Any]:
    """A run over local files as YAML values: `text` to fill blanks in, `task` a cloze; no stages yet."""
    if not (folder / "data").exists():
        write_data(folder / "data")
    files = {"source": "files", "path": str(folder / "data"), "files": {s: f"{s}.jsonl" for s in ("train", "test")}}
    files |= {"max_length": LONGEST}
    return {
        "name": "glm",
        "output": str(folder / "runs"),
        "tokenizer": {"train_on": "text", "vocab_size": 330, "commands": "glm"},
        "engine": {"device": "cpu", "precision": "fp32", "threads": 1},
        "data": {"text": {**files, "task": "glm-infill", **data}, "task": {**files, **CLOZE}},
        "evaluate": {"data": "task", "resamples": 100},
    }


def stage(data: str, student: Any = None, *, steps: int = 6, **more: Any) -> dict[str, Any]:
    """A stage of `values`; a student of one layer by default."""
    small = {"architecture": "glm_blocklm", "layers": 1, "width": 32, "heads": 4}
    kind = "distill" if "teachers" in more else "finetune"
    return {
        "kind": kind,
        "data": data,
        "student": student or small,
        "steps": steps,
        "batch": {"sequences": 16},
        "optimizer": {"lr": 1e-2},
        **more,
    }


def part_b(batch: Any) -> torch.Tensor:
    """Positions of part B, told by the length of part A alone, [B,L] bool."""
    column = torch.arange(batch.input_ids.shape[1])
    return (column >= batch.sep[:, None]) & (column < batch.attention_mask.sum(1)[:, None])
