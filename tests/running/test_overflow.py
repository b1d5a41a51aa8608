"""A teacher that overflows: the message names it at its place in the user's file, and nothing of it is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import NAME, tiny_config
from transformers import GPT2Config, GPT2LMHeadModel

import mtkd
from mtkd.errors import DataError, NonFiniteError

RUN_ALONE: dict[str, Any] = {"evaluate": {"ensembles": [], "comparisons": []}}


def teacher_folder(folder: Path, harm: Callable[[GPT2LMHeadModel], object] | None, dtype: Any = torch.float32) -> str:
    """A model of the tiny run's vocabulary; `harm` changes its weights."""
    torch.manual_seed(0)
    shape = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=300, bos_token_id=0, eos_token_id=0, **shape))
    with torch.no_grad():
        (harm or (lambda model: None))(model)
    model.to(dtype).save_pretrained(folder)
    return str(folder)


def long_texts_overflow(model: GPT2LMHeadModel) -> object:
    """Finite weights: what is seen at the first positions is finite, the norm of the others is not."""
    return model.transformer.wpe.weight[4:].fill_(3e38)


def all_overflows(model: GPT2LMHeadModel) -> object:
    return model.transformer.ln_f.weight.fill_(3e38)


def infinite(model: GPT2LMHeadModel) -> object:
    return model.transformer.ln_f.weight[3:4].fill_(torch.inf)


def two_teachers(tmp_path: Path, bad: str, **stage: Any) -> Any:
    """A student of a good teacher and a bad one, the second in its list."""
    good = teacher_folder(tmp_path / "good", None)
    teachers = [{"model": good, "name": "good"}, {"model": bad, "name": "bad", **stage.pop("teacher", {})}]
    student = {"teachers": teachers, "weighting": "uniform", **stage}
    return tiny_config(tmp_path, stages={"teacher": None, "student": student}, **RUN_ALONE)


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed"])
def test_a_teacher_that_overflows_is_named(tmp_path: Path, backend: str) -> None:
    """Its weights are finite; products of them are not."""
    bad = teacher_folder(tmp_path / "bad", long_texts_overflow)
    config = two_teachers(tmp_path, bad, teacher={"backend": backend})
    with pytest.raises(NonFiniteError, match="teacher 'bad' gives numbers that are not finite") as caught:
        mtkd.run(config)
    assert caught.value.where == "stages.student.teachers[1]"
    assert caught.value.line.startswith(f"{tmp_path / 'run.yaml'}:")
    assert str(caught.value.found).startswith("logits at ")
    assert "drop this teacher" in caught.value.todo
    assert list((tmp_path / "runs" / NAME).glob("stages/*/checkpoints/step-*")) == []


def test_a_teacher_that_is_fine_is_not_blamed(tmp_path: Path) -> None:
    """A learning rate that is too large is the student's."""
    bad = teacher_folder(tmp_path / "other", None)
    with pytest.raises(NonFiniteError, match="a loss or gradient is not finite") as caught:
        mtkd.run(two_teachers(tmp_path, bad, optimizer={"lr": 1e30}))
    assert caught.value.where == "stages.student"


def test_hidden_states_that_overflow_are_named(tmp_path: Path) -> None:
    """Where no loss reads logits."""
    bad = teacher_folder(tmp_path / "bad", long_texts_overflow)
    rows = [{"feature": "hidden", "loss": "mse", "teacher_layer": "last"}]
    with pytest.raises(NonFiniteError, match="teacher 'bad' gives") as caught:
        mtkd.run(two_teachers(tmp_path, bad, method=None, match=rows))
    assert caught.value.where == "stages.student.teachers[1]"
    assert str(caught.value.found).startswith("hidden")


@pytest.mark.parametrize("targets", ["top", "sampled"])
def test_no_cache_keeps_what_overflows(tmp_path: Path, targets: str) -> None:
    bad = teacher_folder(tmp_path / "bad", long_texts_overflow)
    stage = {"kind": "cache", "teachers": [{"model": bad, "name": "bad"}], "data": "text", "batch": {"sequences": 8}}
    stage["cache"] = {"targets": targets, "k": 8}
    config = tiny_config(tmp_path, stages={"teacher": None, "student": None, "kept": stage}, **RUN_ALONE)
    with pytest.raises(NonFiniteError, match="teacher 'bad' gives") as caught:
        mtkd.run(config)
    assert caught.value.where == "stages.kept.teachers[0]"


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed"])
def test_a_teacher_that_always_overflows_is_refused_before_training(tmp_path: Path, backend: str) -> None:
    """It was taken for an architecture that mtkd does not know: NaN differs from everything."""
    bad = teacher_folder(tmp_path / "bad", all_overflows)
    with pytest.raises(DataError, match="gives numbers that are not finite") as caught:
        mtkd.run(two_teachers(tmp_path, bad, teacher={"backend": backend}))
    assert caught.value.where == "stages.student.teachers[1].model"
    assert "drop this teacher" in caught.value.todo


@pytest.mark.parametrize("backend", ["resident", "offload", "streamed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_infinite_are_refused(tmp_path: Path, backend: str, dtype: torch.dtype) -> None:
    """As somebody's conversion to fp16 leaves them."""
    bad = teacher_folder(tmp_path / "bad", infinite, dtype)
    with pytest.raises(DataError, match="the teacher's weights are not finite") as caught:
        mtkd.run(two_teachers(tmp_path, bad, teacher={"backend": backend}))
    assert "stages.student.teachers[1]" in caught.value.used_by + caught.value.where
    assert "drop this teacher" in caught.value.todo
