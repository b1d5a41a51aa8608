"""Whole runs with streamed teachers: refused when they are planned, counted by the layer, equal to resident ones."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cache_runs
import pytest
import torch
from cache_runs import EXACT, LIVE, TEACHERS
from safetensors.torch import load_file, save_file
from tiny_run import tiny_config
from transformers import GPT2Config, GPT2LMHeadModel

import mtkd
import mtkd.running.run
from mtkd.data.tokenizers import train_tokenizer
from mtkd.errors import DataError, UserError
from mtkd.pool.backends import check_room, teacher_share
from mtkd.pool.sizes import Place, TeacherSize

STREAMED = [{**teacher, "backend": "streamed"} for teacher in LIVE]


@pytest.mark.slow
def test_caches_and_students_are_those_of_resident_teachers(tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    whole.mkdir()
    changes: dict[str, Any] = {"cache": EXACT, "student": {"steps": 4}, "evaluate": {"ensembles": []}}
    made = cache_runs.values(whole, **changes)
    del made["stages"]["student"]
    mtkd.running.run.run(cache_runs.config(whole, made))
    # the same two teachers, whose files another run's cache and student stream
    shutil.copytree(whole, other)
    run = other / "runs" / "tiny"
    for stage in ("03-cache", "04-live"):
        shutil.rmtree(run / "stages" / stage)
    again = cache_runs.values(other, **changes)
    del again["stages"]["student"]
    again["stages"]["cache"]["teachers"] = again["stages"]["live"]["teachers"] = STREAMED
    mtkd.running.run.run(cache_runs.config(other, again))
    for name in TEACHERS:
        one, two = (cache_runs.cache_bytes(place / "runs" / "tiny", name) for place in (whole, other))
        shards = [file for file in one if file.startswith("shard-")]
        assert len(shards) == 5
        assert all(one[file] == two[file] for file in shards)
    students = [cache_runs.weights(place / "runs" / "tiny", "live") for place in (whole, other)]
    assert all(torch.equal(value, students[1][name]) for name, value in students[0].items())
    # where the weights are does not make another cache
    first = (run / "stages" / "03-cache" / "DONE").stat().st_mtime_ns
    again["stages"]["cache"]["teachers"] = again["stages"]["live"]["teachers"] = LIVE
    mtkd.running.run.run(cache_runs.config(other, again))
    assert (run / "stages" / "03-cache" / "DONE").stat().st_mtime_ns == first


def teacher_folder(folder: Path) -> Path:
    """A GPT-2 of one layer with its tokenizer, in bf16."""
    tokenizer = train_tokenizer(["the teacher shows a student how"], 300)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def planned(folder: Path, kind: str = "distill", **model: Any) -> Any:
    teacher = {"name": "t", "model": {"path": str(folder / "teacher"), **model}, "backend": "streamed"}
    stage: dict[str, Any] = {"teachers": [teacher]}
    if kind == "cache":
        stage |= dict.fromkeys(("student", "method", "steps", "optimizer", "save_every", "keep"))
        stage |= {"kind": "cache", "batch": {"sequences": None, "tokens": 256}}
    changes = {"stages": {"teacher": None, "student": stage}, "tokenizer": None, "evaluate": {"comparisons": []}}
    if kind == "cache":
        changes["evaluate"] = {"comparisons": [], "ensembles": []}
    return mtkd.plan(tiny_config(folder, **changes)).stages[0]


@pytest.mark.parametrize("kind", ["distill", "cache"])
def test_weights_are_compared_with_the_configuration_by_the_plan(kind: str, tmp_path: Path) -> None:
    file = teacher_folder(tmp_path / "teacher") / "model.safetensors"
    stage = planned(tmp_path, kind)
    assert [m.backend for m in stage.models][-1] == "streamed"
    held = load_file(file)
    name = "transformer.h.0.mlp.c_fc.weight"
    save_file({n: v for n, v in held.items() if n != name}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match=f"1 missing: {name}"):
        planned(tmp_path, kind)
    save_file(held, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match="truncated"):
        planned(tmp_path, kind)


def test_a_part_of_a_model_is_refused(tmp_path: Path) -> None:
    teacher_folder(tmp_path / "teacher")
    for cut in ({"keep_layers": [1]}, {"slice": {"width": 8}}):
        with pytest.raises(UserError, match="drop keep_layers and slice"):
            planned(tmp_path, **cut)


def test_the_plan_counts_a_layer_and_the_heads() -> None:
    streamed = [TeacherSize(110, 30, "streamed", layers=8), TeacherSize(90, 40, "streamed", layers=5)]
    mixed = [*streamed, TeacherSize(7, 1, "resident")]
    assert teacher_share(streamed, Place(on_gpu=False)).rank == 10 + 40
    assert teacher_share(mixed, Place(on_gpu=False)).rank == 7 + 10 + 40
    assert teacher_share(mixed, Place(on_gpu=True)).rank == 7 + 10 + 30 + 40


def test_a_system_that_cannot_give_pages_back_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = [TeacherSize(110, 30, "streamed")]
    check_room(streamed, Place(on_gpu=True), tmp_path, "stages.s.teachers")
    monkeypatch.delattr("mmap.MADV_DONTNEED")
    with pytest.raises(UserError, match="need Linux"):
        check_room(streamed, Place(on_gpu=True), tmp_path, "stages.s.teachers")
