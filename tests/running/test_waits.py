"""Where the host waits for a GPU within an optimizer step: once, for the gradient's norm, but where it is said."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pretend_gpu import PretendGPU
from tiny_run import tiny_values, write_data

import mtkd
from mtkd.config.read import load_config
from mtkd.running import run as running
from mtkd.running.build import BuiltStage

GPT = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.1}
BERT = {"architecture": "bert", "layers": 1, "width": 8, "heads": 2}
LLAMA = {"architecture": "llama", "layers": 1, "width": 8, "heads": 2}
TEACHERS = ["stage:a", "stage:b"]
NORM = ("_local_scalar_dense", "engine/torch_engine.py:step")

# docs/waits.md says why.
MORE = {
    "mgda": [("tolist", "objective/looks.py:before_step")],
    "rl": [("tolist", "objective/looks.py:after_step")],
    "cached": [("_local_scalar_dense", "objective/onepass.py:_outside")],
}
INSIDE_TORCH = ("add", "models/attention.py:tap_attention")
"""torch's own composition of attention makes a mask, which on a GPU lies there."""

SHORT = {"kind": "distill", "steps": 4, "batch": {"sequences": 8}, "optimizer": {"lr": 1e-2}}
LM = {**SHORT, "student": GPT, "teachers": TEACHERS, "method": "kd"}
CLASSES = {**SHORT, "data": "task", "student": BERT, "teachers": ["stage:c", "stage:d"], "method": "kd"}
CACHED = [{"name": n, "model": f"stage:cache/{n}", "backend": "cached"} for n in "ab"]
LIVE = [{"name": n, "model": f"stage:{n}"} for n in "ab"]

STAGES = {
    "uniform": LM,
    "tokens": {**LM, "weighting": "entropy", "per": "token"},
    "accumulated": {**LM, "weighting": "ca_mkd", "batch": {"sequences": 8, "accumulate": 3}},
    "packed": {**LM, "student": LLAMA, "teachers": ["stage:e", "stage:e2"], "batch": {"sequences": 8, "packing": True}},
    "learned": {**LM, "weighting": "learned"},
    "uncertainty": {**LM, "weighting": "uncertainty"},
    "drop": {**LM, "weighting": "drop"},
    "mgda": {**LM, "weighting": "mgda"},
    "rl": {**LM, "weighting": "rl_kd"},
    "layers": {**LM, "teachers": ["stage:a"], "method": "minilm"},
    "cached": {**LM, "teachers": CACHED},
    "completed": {**LM, "teachers": CACHED, "method": None, "match": [{"feature": "logits", "loss": "reverse_kl"}]},
    "everywhere": {**LM, "match": [{"feature": "hidden", "loss": "mse"}], "weighting": "entropy", "per": "token"},
    "calibrated": {
        **CLASSES,
        "teachers": [
            {"name": n, "model": f"stage:{n}", "calibrate": {"bias": True, "split": "validation"}} for n in "cd"
        ],
    },
    "classes": {**CLASSES, "weighting": "ca_mkd"},
    "gated": {**CLASSES, "weighting": {"name": "learned", "options": {"gate": "pooled"}}},
}


def values(folder: Path) -> dict[str, Any]:
    made = tiny_values(folder)
    made["log_every"] = 100
    made["data"]["task"] = {**made["data"]["text"], "task": "classify", "labels": ["a", "b", "c"]}
    made["data"]["text"].pop("prompt", None)
    taught = {"kind": "finetune", "steps": 1, "batch": {"sequences": 8}, "optimizer": {"lr": 1e-2}}
    made["stages"] = {
        **{name: {**taught, "data": "text", "student": {**GPT, "width": 16}, "seed": i} for i, name in enumerate("ab")},
        **{name: {**taught, "data": "task", "student": BERT, "seed": i} for i, name in enumerate("cd")},
        **{name: {**taught, "data": "text", "student": LLAMA, "seed": i} for i, name in enumerate(("e", "e2"))},
        "cache": {"kind": "cache", "data": "text", "teachers": LIVE, "cache": {"k": 20}, "batch": {"sequences": 4}},
        **{name: {"data": "text", **stage} for name, stage in STAGES.items()},
    }
    made["evaluate"] = {"data": "text", "resamples": 100}
    return made


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PretendGPU]:
    """What was seen of every stage."""
    folder = tmp_path_factory.mktemp("waits")
    write_data(folder / "data")
    chance = random.Random(1)
    for file in (folder / "data").iterdir():
        rows = [json.loads(line) | {"label": chance.choice("abc")} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found: dict[str, PretendGPU] = {}
    train = running.train

    def watched(built: BuiltStage, *rest: Any) -> Any:
        gpu = found[built.name] = PretendGPU()
        inner = [getattr(t, "_teacher", t) for t in built.pool.teachers]  # of a calibrated one
        gpu.take([built.objective, *(t._model for t in inner if hasattr(t, "_model"))])
        batches = built.micro_batches

        def next_step(step: int) -> Any:
            gpu.step = step
            return batches(step)

        built.micro_batches = next_step  # type: ignore[method-assign]
        with gpu:
            return train(built, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "train", watched)
        patch.setattr("mtkd.models.features.free_to_ask", lambda values: False)
        patch.setattr(running, "judge", lambda context: {})
        (folder / "run.yaml").write_text(yaml.safe_dump(values(folder), sort_keys=False))
        mtkd.run(load_config(folder / "run.yaml"))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_waits_once(stage: str, seen: dict[str, PretendGPU]) -> None:
    """For the norm of the gradient, which decides whether there is a step; and where docs/waits.md says why."""
    for step in (1, 2):
        assert sorted(seen[stage].waits[step]) == sorted([NORM, *MORE.get(stage, ())])


@pytest.mark.parametrize("stage", STAGES)
def test_no_operation_meets_a_tensor_of_the_host(stage: str, seen: dict[str, PretendGPU]) -> None:
    """On a GPU it would fail."""
    assert not [place for place in seen[stage].apart if place != INSIDE_TORCH]


def test_a_line_of_metrics_waits_once_more(seen: dict[str, PretendGPU]) -> None:
    assert sorted(seen["uniform"].waits[0]) == sorted([NORM, ("tolist", "running/metrics.py:flush")])


def test_what_waits_is_seen() -> None:
    """Every kind of call that the pretended GPU knows, on tensors of the device and of the host."""
    gpu, device = PretendGPU(), torch.device("cpu")
    host = torch.arange(6.0)
    with gpu:
        there = torch.arange(6.0, device=device)
        asked = [
            lambda x: x.sum().item(),
            lambda x: bool((x > 2).any()),
            lambda x: x.tolist(),
            lambda x: x.cpu(),
            lambda x: x.nonzero(),
            lambda x: x[x > 2],
            lambda x: x[[0, 1]],
            lambda x: x.unique(),
            lambda x: torch.equal(x, x + 1),
            lambda x: x.masked_select(x > 2),
            lambda x: x.clone().index_put_((x > 2,), x[:3]),
        ]
        for number, call in enumerate(asked):
            gpu.step = number
            call(there)
            call(host)
        gpu.step = 100
        host.to(device)
        gpu.step = 101
        torch.tensor([1.0], device=device)
        gpu.step = 102
        host.to(device, non_blocking=True) + there
        there.masked_fill(there > 2, 0)
        there[there > 2] = 0.0
        assert not gpu.apart
        there + host
    assert sorted(gpu.waits) == [*range(len(asked)), 100, 101]
    assert all(len(found) == 1 for found in gpu.waits.values()), gpu.waits
    assert [operation for operation, _ in gpu.apart] == ["add"]
