"""The texts of the proofs: many classes each, a fixed test set, a training pool that every seed cuts in its own way.

banking77 has 77 intents. TREC has its fine types; those with fewer than 30 questions are left out, and 1,500 training
questions are tested on with the 500 test questions. docstrings are the first paragraphs of what is documented in the
installed packages, and the class is the package; its name and dotted paths are cut out of the text. SST-2 has two.
"""

from __future__ import annotations

import ast
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tasks

Row = dict[str, str]

PACKAGES = (
    *("asyncio", "datasets", "deepspeed", "email", "fsspec", "huggingface_hub", "jinja2", "matplotlib", "networkx"),
    *(
        "numpy",
        "pandas",
        "pip",
        "pydantic",
        "pygments",
        "pytest",
        "scipy",
        "sympy",
        "torch",
        "transformers",
        "unittest",
    ),
)
"""Classes of docstrings; those that are not installed are left out."""
PER_PACKAGE = 350
TEST_SHARE = 3  # one docstring in three is tested on


@dataclass(frozen=True)
class Corpus:
    """A data set.

    Attributes:
        read: gives the training pool and the test rows.
        longest: tokens per example.
        lr: of teachers and students.
    """

    read: Callable[[], tuple[list[Row], list[Row]]]
    longest: int = 40
    lr: float = 1e-3


def _banking() -> tuple[list[Row], list[Row]]:
    task = tasks.TASKS["banking77"]
    return list(task.train(tasks.data_folder())), list(task.test(tasks.data_folder()))


def _sst2() -> tuple[list[Row], list[Row]]:
    task = tasks.TASKS["sst2"]
    return list(task.train(tasks.data_folder())), list(task.test(tasks.data_folder()))


def _trec() -> tuple[list[Row], list[Row]]:
    def read(name: str) -> Iterator[Row]:
        file = tasks.data_folder() / "classification" / "TREC" / name
        for line in file.read_text(encoding="latin-1").splitlines():
            label, _, text = line.partition(" ")
            yield {"text": text, "label": label}

    train, test = list(read("train.txt")), list(read("test.txt"))
    counts = Counter(row["label"] for row in train)
    train, test = ([row for row in rows if counts[row["label"]] >= 30] for rows in (train, test))
    random.Random(0).shuffle(train)
    return train[1_500:], [*test, *train[:1_500]]


def _docstrings() -> tuple[list[Row], list[Row]]:
    train: list[Row] = []
    test: list[Row] = []
    for package in PACKAGES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            continue
        texts = sorted(_paragraphs(Path(spec.submodule_search_locations[0]), package))
        random.Random(0).shuffle(texts)
        rows = [{"text": text, "label": package} for text in texts[:PER_PACKAGE]]
        if len(rows) >= 100:
            test += rows[: len(rows) // TEST_SHARE]
            train += rows[len(rows) // TEST_SHARE :]
    random.Random(0).shuffle(train)
    return train, test


def _paragraphs(folder: Path, package: str) -> set[str]:
    """First paragraphs of docstrings below a package's folder, without the package's name."""
    found: set[str] = set()
    names = re.compile(rf"\b{re.escape(package)}\b|\b\w+(\.\w+)+", re.IGNORECASE)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(folder.rglob("*.py")):
        if "tests" in file.parts or "vendor" in str(file):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, documented)]
        for text in texts:
            first = " ".join(names.sub(" ", (text or "").partition("\n\n")[0]).split())
            if 30 <= len(first) <= 250:
                found.add(first)
    return found


CORPORA = {
    "banking77": Corpus(_banking),
    "trec": Corpus(_trec),
    "docstrings": Corpus(_docstrings, 48),
    "sst2": Corpus(_sst2, 48),
}


MEAN = 20.0
"""The mean of all tokens counts so many times what the first token has: then its state is the mean, cosine 0.999."""


def averaging(source: Path, target: Path) -> None:
    """Copy an encoder with one more layer, which puts the mean of all tokens into the first one.

    The encoder was trained for sentence embeddings, which are this mean; a classifier reads the first token. Without
    this layer hundreds of steps go by before a classifier has learnt to look at the others.
    """
    import copy

    import torch
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(source)
    last, eye = copy.deepcopy(model.encoder.layer[-1]), torch.eye(model.config.hidden_size)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in last.parameters():
            parameter.zero_()
        attention = last.attention
        attention.self.value.weight.copy_(eye)
        attention.output.dense.weight.copy_(MEAN * eye)
        for norm in (attention.output.LayerNorm, last.output.LayerNorm):
            norm.weight.fill_(1)
        # Small and not zero: with both sides of a product at zero neither would ever have a gradient.
        for linear in (attention.self.query, attention.self.key, last.intermediate.dense):
            linear.weight.normal_(0, 0.02)
        model.pooler.dense.weight.copy_(eye / 2)  # tanh is nearly linear there
        model.pooler.dense.bias.zero_()
    model.encoder.layer.append(last)
    model.config.num_hidden_layers += 1
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    model.save_pretrained(target)  # last: its config.json says that the folder is whole


@dataclass(frozen=True)
class Texts:
    """A data set on the disk: its rows, its classes in order, and the encoder with the word pieces that it uses."""

    train: list[Row]
    test: list[Row]
    classes: list[str]
    model: str


def load(name: str, folder: Path) -> Texts:
    """Read a corpus, and write it and its encoder into `folder` once."""
    files = {split: folder / f"{split}.jsonl" for split in ("train", "test")}
    if not (folder / "model" / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for split, rows in zip(files, CORPORA[name].read(), strict=True):
            files[split].write_text("".join(json.dumps(row) + "\n" for row in rows))
        texts = [json.loads(line)["text"] for file in files.values() for line in file.open()]
        tasks.trim_encoder(tasks.encoder_folder(), folder / "trimmed", texts)
        averaging(folder / "trimmed", folder / "model")
    train, test = ([json.loads(line) for line in file.open()] for file in files.values())
    return Texts(train, test, sorted({row["label"] for row in train}), str((folder / "model").resolve()))
