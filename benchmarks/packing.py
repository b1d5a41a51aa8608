"""Useful tokens per second on real lengths: padded batches, grouped by length, packed.

A decoder on the questions and answers of GSM8K, prompts masked, and a classifier on the sentences of SST-2, both below
$MTKD_DATA or ../shared/data. A step is the forward and backward pass of a whole objective; useful are the
examples' own tokens. The arms take turns, `--rounds` times; the fastest round of each counts. Order and batches are the
library's own.

    OMP_NUM_THREADS=2 python benchmarks/packing.py [--steps 12] [--rounds 3]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from mtkd.config import BatchConfig, DataConfig, ModelConfig, Named
from mtkd.config.match import Match
from mtkd.data.load import LoadedData, load_data
from mtkd.data.raw import Raw
from mtkd.data.sampler import Order, TrainStream
from mtkd.data.tokenizers import num_real_ids, train_tokenizer
from mtkd.engine.dist import Dist
from mtkd.models.load import build_model
from mtkd.models.request import ModelRequest
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import compile_rows
from mtkd.objective.objective import Objective
from mtkd.objective.projection import make_projections
from mtkd.objective.settings import Wiring
from mtkd.running.train import global_counts
from mtkd.weightings.make import make_weighting, stage_facts

ROOT = Path(__file__).parents[1]
SEQUENCES, VOCABULARY = 32, 8192
ARMS = {
    "gsm8k": {
        "padded": BatchConfig(sequences=SEQUENCES),
        "grouped": BatchConfig(sequences=SEQUENCES, group_by_length=True),
        "packed": BatchConfig(sequences=SEQUENCES, packing=True),
    },
    "sst2": {
        "padded": BatchConfig(sequences=SEQUENCES),
        "grouped": BatchConfig(sequences=SEQUENCES, group_by_length=True),
    },
}


def data_folder() -> Path:
    """$MTKD_DATA, or ../shared/data next to the repository."""
    return Path(os.environ.get("MTKD_DATA", ROOT.parent / "shared" / "data"))


def load(task: str, folder: Path) -> tuple[LoadedData, PreTrainedTokenizerBase]:
    """The train split of a task, and a tokenizer of 8,192 ids trained on it."""
    if task == "gsm8k":
        lines = (folder / "instruct" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
        rows = Dataset.from_list([json.loads(line) for line in lines])
        config = DataConfig(source="files", prompt="{question}\n", text="answer", max_length=512)
        texts = [*rows["question"], *rows["answer"]]
    else:
        with (folder / "glue" / "SST-2" / "train.tsv").open(encoding="utf-8") as file:
            rows = Dataset.from_list(list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)))
        config = DataConfig(source="files", task="classify", text="sentence", max_length=128)
        texts = list(rows["sentence"])
    tokenizer = train_tokenizer(texts, VOCABULARY, closed=task == "sst2")
    return load_data(task, config, Raw({"train": rows}, "0" * 64, task), tokenizer), tokenizer


def objective(
    data: LoadedData, tokenizer: PreTrainedTokenizerBase, shape: Mapping[str, int], packing: bool
) -> Objective:
    """A fresh model (a Llama for tokens, a BERT for classes) that learns from the labels."""
    causal = data.task.token_level
    config = ModelConfig(architecture="llama" if causal else "bert", **shape)
    labels = (data.num_labels, data.label_names)
    request = ModelRequest.of_data(data.name, data.config, labels, tokenizer, num_real_ids(tokenizer), Path)
    model = build_model(config, request)
    student = TappedModel(model, data.task.auto_class, num_real_ids(tokenizer))
    if packing:
        student.enable_packing("benchmark")
    label = Match(feature="logits", loss="ce", target="labels")
    rows = compile_rows([label], student.info, {}, token_level=causal, regression=False, where="benchmark")
    weighting = make_weighting(Named(name="uniform"), stage_facts((), [], student, 0), "benchmark")
    return Objective(
        student, rows, weighting, make_projections(rows, student.info, [], 0), (), Wiring("example", causal)
    )


class Arm:
    """A way to make batches, and the model that reads them; `run` goes on where it stopped."""

    def __init__(self, task: str, name: str, shape: Mapping[str, int], folder: Path) -> None:
        data, tokenizer = load(task, folder)
        batch = ARMS[task][name]
        split = data.split("train")
        self.objective = objective(data, tokenizer, shape, batch.packing)
        self._stream = TrainStream(split, Order(split.lengths, batch, 0), 0, 1, 1)

    def run(self, steps: int) -> dict[str, float]:
        """Seconds, useful tokens and padded positions of some steps, forward and backward."""
        self.objective.train()
        useful = padded = seconds = 0.0
        for _ in range(steps):
            batches = next(self._stream)
            counts, _ = global_counts(batches, Dist())
            begun = time.perf_counter()
            loss, _ = self.objective(batches[0], [], counts)
            loss.backward()
            seconds += time.perf_counter() - begun
            self.objective.zero_grad()
            useful += float(batches[0].token_mask.sum())
            padded += batches[0].input_ids.numel()
        return {"seconds": seconds, "useful": useful, "padded": padded}


def measure(task: str, steps: int, rounds: int, shape: Mapping[str, int], folder: Path) -> dict[str, dict[str, float]]:
    """Per arm: the best round's useful tokens per second, and the useful share of the padded positions."""
    arms = {name: Arm(task, name, shape, folder) for name in ARMS[task]}
    for arm in arms.values():
        arm.run(2)  # buffers and threads
    found: dict[str, list[dict[str, float]]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            found[name].append(arm.run(steps))
    return {
        name: {
            "tokens_per_second": max(r["useful"] / r["seconds"] for r in results),
            "useful_share": sum(r["useful"] for r in results) / sum(r["padded"] for r in results),
        }
        for name, results in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="steps per arm and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    shape = {"layers": options.layers, "width": options.width, "heads": 4}
    for task in ARMS:
        results = measure(task, options.steps, options.rounds, shape, data_folder())
        for name, values in results.items():
            gain = values["tokens_per_second"] / results["padded"]["tokens_per_second"]
            print(
                f"{task:6} {name:8} {values['tokens_per_second']:9,.0f} useful tokens/s  x {gain:.2f}  "
                f"(useful positions before packing: {values['useful_share']:.0%})",
                flush=True,
            )


if __name__ == "__main__":
    main()
