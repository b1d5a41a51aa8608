"""Distillation from a teacher cache: whole runs, written as a YAML file would have them, on the text of wikitext-2.

`time`: the setting's student on labels alone and on the cache of four fresh teachers, per step. `quality`: four trained
teachers, and per seed three students of the same steps: on labels, from the live teachers, from their cache.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import sys
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path
from typing import Any

from sides.setting import BATCH, LENGTH, STUDENT, TEACHER, VOCABULARY, Result

TEACHERS = 4
KEPT = 50
"""Log-probabilities a cache keeps per position."""


def time(quick: bool, folder: Path, threads: int) -> Result:
    """Seconds per step (medians) of a label-only step and a cached one, and what the cache holds per token.

    The teachers (of two layers: a cached step does not know) are fresh and the text is random words: that decides no
    time, and distributions this flat are a codec's worst case.
    """
    steps = 3 if quick else 12
    teacher = _shape(TEACHER, 2)
    fast = {"steps": steps, "batch": {"sequences": BATCH}, "optimizer": {"lr": 1e-4, "warmup": 0.0}}
    stages: dict[str, Any] = {
        f"teacher-{k}": {"kind": "finetune", "student": teacher, "seed": k, **fast, "steps": 1} for k in range(TEACHERS)
    }
    stages["cache"] = _cache()
    for turn in range(1 if quick else 2):  # in turns, so that a machine that slows down hurts both
        stages[f"labels-{turn}"] = {"kind": "finetune", "student": _shape(STUDENT), **fast}
        stages[f"cached-{turn}"] = {"kind": "distill", "student": _shape(STUDENT), **_from_cache(), **fast}
    source = _made_up(folder / "text", 40 if quick else 100)
    data = {"path": str(source), "files": {"train": "train.txt", "test": "test.txt"}, "validation_share": 0.05}
    config = _config("cached-time", folder, threads, {**data, "max_length": LENGTH}, stages, "fp32")
    config["tokenizer"] = {"path": str(source)}
    path = _run({**config, "log_every": 1})
    found = {name: statistics.median(_seconds(path, name)) for name in ("labels", "cached")}
    return {**found, "bytes_per_token": _stored(path)["bytes_per_token"]}


def quality(quick: bool, folder: Path, threads: int) -> Result:
    """Nats per token on the test text of every student, of the teachers and of their ensemble; facts of the cache."""
    steps, seeds = (4, 1) if quick else (250, 3)
    training = {"batch": {"sequences": 8}, "optimizer": {"lr": 2e-3, "betas": [0.9, 0.98]}, "steps": steps}
    sizes = [(3, 192), (2, 192), (3, 128), (2, 256)]
    stages: dict[str, Any] = {
        f"teacher-{k}": {
            "kind": "finetune",
            "student": {"architecture": "llama", "layers": layers, "width": width, "heads": 4},
            "seed": 100 + k,
            **training,
        }
        for k, (layers, width) in enumerate(sizes)
    }
    stages["cache"] = _cache()
    student = {"architecture": "llama", "layers": 2, "width": 96, "heads": 4}
    rows = [{"loss": "kl", "weight": 0.8}, {"loss": "ce", "target": "labels", "weight": 0.2}]
    live = [f"stage:teacher-{k}" for k in range(TEACHERS)]
    for seed in range(seeds):
        own = {"student": student, "seed": seed, **training}
        stages[f"labels-{seed}"] = {"kind": "finetune", **own}
        stages[f"live-{seed}"] = {"kind": "distill", "teachers": live, "match": rows, **own}
        stages[f"cached-{seed}"] = {"kind": "distill", **_from_cache(), "match": rows, **own}
    data: dict[str, Any] = {
        "path": str(_text_folder()),
        "files": {"train": "valid.txt", "test": "test.txt"},  # train.txt is not in the data folder
        "validation_share": 0.02,
        "max_length": 128,
        "limit": {"validation": 20, "test": 20 if quick else 300},
    }
    if quick:
        data["limit"]["train"] = 60
    config = _config("cached-quality", folder, threads, data, stages, "bf16")
    config["tokenizer"] = {"train_on": "text", "vocab_size": 4_096}
    scored = [n for n in stages if n != "cache"]
    path = _run({**config, "evaluate": {"stages": scored, "ensembles": ["live-0"], "resamples": 20}, "log_every": 50})
    models = json.loads((path / "results.json").read_text())["models"]
    nats = {name: math.log(facts["overall"]["perplexity"]) for name, facts in models.items()}
    return {**nats, **_stored(path)}


def _shape(shape: dict[str, int], layers: int | None = None) -> dict[str, Any]:
    return {
        "architecture": "llama",
        "layers": layers or shape["num_hidden_layers"],
        "width": shape["hidden_size"],
        "intermediate": shape["intermediate_size"],
        "heads": shape["num_attention_heads"],
    }


def _cache() -> dict[str, Any]:
    teachers = [f"stage:teacher-{k}" for k in range(TEACHERS)]
    return {
        "kind": "cache",
        "teachers": teachers,
        "batch": {"sequences": BATCH},
        "cache": {"targets": "top", "k": KEPT},
    }


def _from_cache() -> dict[str, Any]:
    names = [f"teacher-{k}" for k in range(TEACHERS)]
    teachers = [{"name": name, "model": f"stage:cache/{name}", "backend": "cached"} for name in names]
    return {"teachers": teachers, "match": [{"loss": "kl"}]}


def _config(
    name: str, folder: Path, threads: int, data: dict[str, Any], stages: dict[str, Any], precision: str
) -> dict[str, Any]:
    return {
        "name": name,
        "seed": 0,
        "output": str(folder / "runs"),
        "data": {"text": {"source": "files", **data}},
        "engine": {"kind": "torch", "device": "cpu", "precision": precision, "threads": threads},
        "stages": stages,
    }


def _made_up(folder: Path, lines: int) -> Path:
    """Lines of random words, and a tokenizer of VOCABULARY ids that knows them: text has fewer at this size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t0"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    LlamaConfig(vocab_size=VOCABULARY).save_pretrained(folder)  # a tokenizer is looked for in a model's folder
    draw = random.Random(0)
    for file, count in (("train.txt", lines), ("test.txt", 2)):
        text = [" ".join(f"t{draw.randrange(3, VOCABULARY)}" for _ in range(LENGTH)) for _ in range(count)]
        (folder / file).write_text("\n\n".join(text) + "\n")
    return folder


def _text_folder() -> Path:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("MTKD_DATA", root.parent / "shared" / "data")) / "lm" / "wikitext-2"
    if not (folder / "valid.txt").exists():
        sys.exit("needs wikitext-2: set MTKD_DATA to the folder with lm/wikitext-2/{valid,test}.txt")
    return folder


def _run(config: dict[str, Any]) -> Path:
    """Run it, or what is left of it; returns its folder."""
    import yaml

    import mtkd

    path = Path(config["output"])
    path.mkdir(parents=True, exist_ok=True)
    file = path / f"{config['name']}.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False))
    with redirect_stdout(sys.stderr):  # the last line of stdout is the measurement
        mtkd.run(mtkd.load_config(file))
    return path / config["name"]


def _seconds(path: Path, kind: str) -> list[float]:
    """Seconds of every step but the first of the stages `kind`-0, `kind`-1..."""
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found: list[float] = []
    for stage in dict.fromkeys(line["stage"] for line in lines if line["stage"].startswith(f"{kind}-")):
        ends = [line["seconds"] for line in lines if line["stage"] == stage and "seconds" in line]
        found += [b - a for a, b in pairwise(ends)]
    return found


def _stored(path: Path) -> dict[str, float]:
    """Bytes per token and KL of the reconstruction (nats per position), means over the teachers."""
    done = json.loads(next((path / "stages").glob("*-cache/DONE")).read_text())
    facts = list(done["caches"].values())
    kept = {"bytes_per_token": statistics.mean(f["bytes_per_position"] for f in facts)}
    return {**kept, "kl": statistics.mean(f["kl"] for f in facts)} if all("kl" in f for f in facts) else kept
