"""A published GLM checkpoint, converted with its vocabulary, teaches a slice of itself: a GLM-10B in small."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from glm_files import bert_file, originals, write
from tiny_run import tiny_values, write_data
from transformers import AutoModelForCausalLM, AutoTokenizer

import mtkd
from mtkd.models.glm import GLMForConditionalGeneration, convert_checkpoint


def converted(folder: Path) -> Path:
    """A teacher of three layers and width 24, for a vocabulary of 128 rows."""
    _, weights = originals()
    generator = torch.Generator().manual_seed(0)
    weights["word_embeddings.weight"] = 0.2 * torch.randn(128, 24, generator=generator)
    tables = ("transformer.position_embeddings.weight", "transformer.block_position_embeddings.weight")
    weights |= {name: 0.2 * torch.randn(65, 24, generator=generator) for name in tables}
    weights = {name: value.half() for name, value in weights.items()}
    source = write(folder / "published", "parts 2", weights)
    bert_file(source)
    return convert_checkpoint(source, folder / "glm", heads=4).folder


@pytest.mark.slow
def test_a_converted_teacher_teaches_a_slice_of_itself(tmp_path: Path) -> None:
    write_data(tmp_path / "data")
    teacher = converted(tmp_path)
    values = tiny_values(tmp_path)
    student = {
        **values["stages"]["student"],
        "student": {"path": str(teacher), "keep_layers": [1, 3], "slice": {"width": 12, "heads": 4}, "dropout": 0.0},
        "teachers": [{"name": "glm", "model": str(teacher)}],
        "match": [
            {"feature": "hidden", "loss": "mse", "teacher_layer": "last", "student_layer": "last"},
            {"feature": "probs", "loss": "attention_kl", "teacher_layer": "last", "student_layer": "last"},
        ],
        "batch": {"sequences": 8, "packing": True},
    }
    values |= {"tokenizer": {"path": str(teacher)}, "stages": {"student": student}}
    values["evaluate"] = {"resamples": 100}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    config = mtkd.load_config(str(file))
    (planned,) = mtkd.plan(config).stages
    ours, theirs = planned.models
    made = AutoModelForCausalLM.from_pretrained(teacher)
    assert theirs.parameters == sum(p.numel() for p in made.parameters())
    result = mtkd.run(config)
    exported = AutoModelForCausalLM.from_pretrained(result.export("student"))
    assert isinstance(exported, GLMForConditionalGeneration)
    assert sum(p.numel() for p in exported.parameters()) == ours.parameters
    assert (exported.config.num_hidden_layers, exported.config.hidden_size) == (2, 12)
    assert exported.config.hidden_act == "gelu_pytorch_tanh"
    assert "[sMASK]" in AutoTokenizer.from_pretrained(result.export("student")).get_vocab()
    metrics = [json.loads(line) for line in (Path(result.folder) / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in metrics if "loss" in line]
    assert losses[-1] < losses[0]
