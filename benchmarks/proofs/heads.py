"""Teachers of one second each: small heads on frozen sentence embeddings, which mtkd asks through a teacher of its own.

The encoder is all-MiniLM-L6-v2 as it was published (mean of the last hidden states, length 1); its embeddings of a
corpus are computed once. A head is a layer of 256 units with ReLU and dropout and an output per class, trained by Adam
on whole batches. Its logits of all texts are written into a file, and `answering.py` reads them there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tasks
import torch
from torch import nn

from proofs.corpora import Row
from proofs.setting import Setting

TEXTS = "texts.json"
WIDTH, DROPOUT = 256, 0.2
AT_ONCE = 128  # texts per forward of the encoder


def embeddings(setting: Setting) -> tuple[dict[str, int], torch.Tensor]:
    """Number of every text, and the embeddings [texts,384] float32."""
    texts = sorted({row["text"] for row in (*setting.texts.train, *setting.texts.test)})
    folder = setting.output / "data" / setting.task
    file = folder / "embeddings.npy"
    if not file.exists():
        (folder / TEXTS).write_text(json.dumps(texts))
        with torch.inference_mode():
            np.save(file, _embedded(texts, setting.corpus.longest).numpy())
    return {text: number for number, text in enumerate(texts)}, torch.from_numpy(np.load(file))


def _embedded(texts: Sequence[str], longest: int) -> torch.Tensor:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tasks.encoder_folder())
    model = AutoModel.from_pretrained(tasks.encoder_folder()).eval()
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    rows = torch.zeros(len(texts), model.config.hidden_size)
    for begin in range(0, len(order), AT_ONCE):
        some = order[begin : begin + AT_ONCE]
        batch = tokenizer(
            [texts[number] for number in some], padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.autocast("cpu", torch.bfloat16):
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        rows[some] = nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    return rows


@dataclass(frozen=True)
class Head:
    """How a head is trained.

    Attributes:
        rows: its labelled texts; the class "other" is none of the corpus's.
        steps: of Adam over all rows; few of them make a flat teacher.
    """

    rows: Sequence[Row]
    seed: int
    steps: int = 150
    lr: float = 5e-3


def logits(setting: Setting, head: Head, classes: Sequence[str]) -> np.ndarray:
    """A trained head's logits of all texts of the corpus, [texts,C] float16, in the order of `embeddings`."""
    numbers, vectors = embeddings(setting)
    column = {name: number for number, name in enumerate(classes)}
    inputs = vectors[[numbers[row["text"]] for row in head.rows]]
    labels = torch.tensor([column[row["label"]] for row in head.rows])
    with torch.random.fork_rng():
        torch.manual_seed(head.seed)
        model = nn.Sequential(
            nn.Linear(inputs.shape[1], WIDTH), nn.ReLU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, len(classes))
        )
        optimizer = torch.optim.AdamW(model.parameters(), head.lr, weight_decay=0.01)
        for _ in range(head.steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()
    with torch.inference_mode():
        return np.asarray(model.eval()(vectors).numpy(), np.float16)


def teacher(setting: Setting, name: str, head: Head, seed: int, **values: Any) -> dict[str, Any]:
    """The block of a head as a teacher: trained once, its answers kept in a file.

    A class of the corpus that none of its rows has is an output like any other, which it learns to be improbable.
    """
    folder = setting.output / "data" / setting.task / f"{setting.proof}-{seed}"
    file = folder / f"{name}.npy"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part.npy")
        np.save(part, logits(setting, head, setting.texts.classes))
        part.replace(file)
    texts = folder.parent / TEXTS
    options = {"logits": str(file.resolve()), "texts": str(texts.resolve()), "longest": setting.corpus.longest}
    return {"name": name, "backend": "answering", "options": options, **values}


def answers(setting: Setting, name: str, seed: int, rows: Sequence[Row]) -> np.ndarray:
    """A head's logits of some rows, [rows,C]."""
    file = setting.output / "data" / setting.task / f"{setting.proof}-{seed}" / f"{name}.npy"
    numbers, _ = embeddings(setting)
    kept: np.ndarray = np.load(file).astype(np.float32)
    return kept[[numbers[row["text"]] for row in rows]]
