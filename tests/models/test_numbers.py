"""A number format is a plug-in: its weights are counted by what it says, in plan and files, and its teachers run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import write_data, write_yaml
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import mtkd
from mtkd.config import ModelConfig
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.models.formats import FORMATS
from mtkd.models.heads import find_heads
from mtkd.models.info import CAUSAL_LM
from mtkd.models.load import build_model, load_config
from mtkd.models.numbers import numbers_of
from mtkd.models.request import ModelRequest, Taught
from mtkd.models.taps import TappedModel
from mtkd.registry import load_plugins

IDS, WIDTH, UNITS, LAYERS, KV_WIDTH = 300, 32, 64, 2, 16

PLUGIN = """
import mtkd
import torch
from torch import nn


class Rows(nn.Module):
    def __init__(self, layer):
        super().__init__()
        device = layer.weight.device
        whole = torch.empty(layer.weight.shape, dtype=torch.int8, device=device)  # [out,in]
        self.weight = nn.Parameter(whole, requires_grad=False)
        self.scale = nn.Parameter(torch.empty(layer.out_features, 1, device=device), requires_grad=False)  # [out,1]

    def forward(self, inputs):
        return nn.functional.linear(inputs, self.weight * self.scale)


@mtkd.number_format("int8-rows")
def int8_rows(model, settings):
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name not in settings["kept"]:
            model.set_submodule(name, Rows(layer))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plug-in, and the same Llama as `whole` (its matrices are rows of whole numbers times a scale) and `int8`."""
    folder = tmp_path_factory.mktemp("formats")
    (folder / "int8.py").write_text(PLUGIN)
    write_data(folder / "data")
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=IDS, hidden_size=WIDTH, intermediate_size=UNITS, num_hidden_layers=LAYERS, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
        )
    )  # fmt: skip
    generator, stored = torch.Generator().manual_seed(0), {}
    for name, value in model.state_dict().items():
        if "_proj" not in name:
            stored[name] = value
            continue
        rows = torch.randint(-127, 128, value.shape, generator=generator).to(torch.int8)
        scale = 0.002 * torch.rand(len(rows), 1, generator=generator)
        value.copy_(rows * scale)
        stored |= {name: rows, name.replace("weight", "scale"): scale}
    tokenizer = train_tokenizer(["the teacher shows a student how"], IDS)
    for kind in ("whole", "int8"):
        model.save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    save_file(stored, folder / "int8" / "model.safetensors", {"format": "pt"})
    file = folder / "int8" / "config.json"
    settings = {"quant_method": "int8-rows", "kept": ["lm_head"]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": settings}))
    return folder


def by_hand() -> tuple[int, int]:
    """(bytes of the Llama in float32, in rows of int8), from its shapes."""
    # query and output, key and value, gate and up, down
    shapes = [(WIDTH, WIDTH)] * 2 + [(KV_WIDTH, WIDTH)] * 2 + [(UNITS, WIDTH)] * 2 + [(WIDTH, UNITS)]
    rest = 2 * IDS * WIDTH + (2 * LAYERS + 1) * WIDTH  # embedding and head, norms
    numbers, rows = LAYERS * sum(r * c for r, c in shapes), LAYERS * sum(r for r, _ in shapes)
    return 4 * (numbers + rest), numbers + 4 * rows + 4 * rest


def config(folder: Path, model: Path, out: Path, more: dict[str, Any] | None = None, **teacher: Any) -> Any:
    changes = {
        "output": str(out),
        "plugins": ["int8.py"],
        "tokenizer": None,
        "stages": {
            "teacher": None,
            "student": {"teachers": [{"name": "t", "model": str(model), **teacher}], "steps": 2, "save_every": None},
        },
        "evaluate": None,
    }
    return mtkd.load_config(write_yaml(folder, **changes, **(more or {})))


def test_a_plan_counts_what_the_format_says(folder: Path, tmp_path: Path) -> None:
    """The teacher's memory is that of its shapes; everything else is what the float32 teacher needs."""
    parts = {}
    for kind, weights in zip(("whole", "int8"), by_hand(), strict=True):
        (stage,) = mtkd.plan(config(folder, folder / kind, tmp_path), memory=True).stages
        assert stage.memory is not None
        parts[kind] = {part.name: part.host_gb * 1e9 for part in stage.memory.parts}
        assert parts[kind]["teachers' weights"] == pytest.approx(weights)
    del parts["whole"]["teachers' weights"], parts["int8"]["teachers' weights"]
    assert parts["whole"] == pytest.approx(parts["int8"])


def test_a_format_takes_no_memory_at_plan_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layout that names no device makes nothing off the meta device, in the count and in the names of the head."""
    models: list[PreTrainedModel] = []

    class Zeros(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
            self.register_buffer("scale", torch.zeros(layer.out_features, 1))

    def zeros(model: PreTrainedModel, settings: Mapping[str, Any]) -> None:
        models.append(model)
        for name, layer in list(model.named_modules()):
            if type(layer) is torch.nn.Linear:
                model.set_submodule(name, Zeros(layer))

    monkeypatch.setitem(FORMATS._values, "int8-rows", zeros)
    config = LlamaConfig.from_pretrained(folder / "int8")
    numbers_of(config, CAUSAL_LM)
    find_heads(config, CAUSAL_LM, folder / "int8")
    assert len(models) == 2
    for model in models:
        assert all(value.is_meta for value in (*model.parameters(), *model.buffers()))


def test_the_numbers_of_a_format(folder: Path) -> None:
    """Parameters are those of the architecture; only what stays in float32 can be trained."""
    load_plugins(("int8.py",), folder)
    whole, int8 = (numbers_of(LlamaConfig.from_pretrained(folder / kind), CAUSAL_LM) for kind in ("whole", "int8"))
    assert (whole.weights, int8.weights) == by_hand()
    assert 4 * whole.parameters == 4 * int8.parameters == by_hand()[0]
    assert whole.head == int8.head == 4 * IDS * WIDTH
    assert whole.trainable == whole.parameters
    assert int8.trainable == 2 * IDS * WIDTH + (2 * LAYERS + 1) * WIDTH


def test_a_teacher_of_a_format_predicts_as_the_float32_one(folder: Path) -> None:
    """The product with rows times scales is that of the numbers that they stand for."""
    load_plugins(("int8.py",), folder)
    request = ModelRequest(CAUSAL_LM, IDS, 16, None, taught=Taught(frozenset({"logits"})))  # type: ignore[arg-type]
    models = [build_model(ModelConfig(path=str(folder / kind)), request) for kind in ("whole", "int8")]
    ids = torch.arange(12).view(2, 6)  # [B,L]
    logits = [model(ids).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-5, atol=1e-6)
    TappedModel(models[1], CAUSAL_LM, IDS).verify()


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed"])
def test_a_student_learns_from_a_teacher_of_a_format(folder: Path, tmp_path: Path, backend: str) -> None:
    """The student learns what it learns from the same numbers in float32."""
    kinds = ("whole", "int8")
    losses = []
    for kind in kinds:
        mtkd.run(config(folder, folder / kind, tmp_path / kind, backend=backend))
        lines = map(json.loads, (tmp_path / kind / "tiny" / "metrics.jsonl").read_text().splitlines())
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert len(losses[0]) == 2
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_cannot_be_done_with_a_format_is_refused(folder: Path, tmp_path: Path) -> None:
    """A model of a format is neither cut nor trained, and one of an unknown format is not read."""
    load_plugins(("int8.py",), folder)
    request = ModelRequest(CAUSAL_LM, IDS, 16, None)  # type: ignore[arg-type]
    teaches = replace(request, taught=Taught(frozenset({"logits"})))
    path = str(folder / "int8")
    for model, asked in ((ModelConfig(path=path), request), (ModelConfig(path=path, keep_layers=(1,)), teaches)):
        with pytest.raises(UserError, match="number format 'int8-rows' is a teacher as it is"):
            load_config(model, asked)
    shutil.copytree(folder / "int8", tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(file.read_text().replace("int8-rows", "int7-rows"))
    with pytest.raises(DataError, match="quantised weights are not supported"):
        load_config(ModelConfig(path=str(tmp_path / "other")), teaches)


def test_a_sharded_teacher_of_a_format_is_refused(folder: Path, tmp_path: Path) -> None:
    """ZeRO-3 gathers floats."""
    engine = {"kind": "deepspeed", "processes": 2}
    sharded = config(folder, folder / "int8", tmp_path, {"engine": engine}, backend="sharded")
    with pytest.raises(UserError, match="does not keep weights of number format 'int8-rows'"):
        mtkd.plan(sharded)
