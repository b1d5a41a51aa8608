"""Whole runs with offloaded teachers: planned, stopped, resumed, scored as an ensemble; bit-equal to resident ones."""

from __future__ import annotations

import shutil
from collections import namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
from test_resume import assert_same_run
from tiny_run import NAME, STUDENT_STEPS, ids_file, tiny_config, with_teacher, write_yaml

import mtkd
from mtkd.config import RunConfig
from mtkd.errors import UserError
from mtkd.pool.backends import teacher_share
from mtkd.pool.sizes import Place, Share, TeacherSize

DISK = "mtkd.engine.disk.shutil.disk_usage"


def pool(backend: str) -> dict[str, Any]:
    """Two teachers, the second one cut from the first: what it is as a model, no file holds."""
    cut = {"name": "cut", "model": {"path": "stage:teacher", "slice": {"width": 8}}, "backend": backend}
    return {"student": {"teachers": [{"model": "stage:teacher", "backend": backend}, cut]}}


@pytest.mark.slow
def test_a_run_stopped_and_resumed_is_the_resident_run(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "offloaded"
    for place in (whole, folder):
        place.mkdir()
    watch = partial(processes.watch, ids_file(whole))
    code, output = processes.run(whole, "run", str(write_yaml(whole, stages=pool("resident"))), prepare=watch)
    assert code == 0, output
    file = str(with_teacher(whole, folder, stages=pool("offload")))
    code, output = processes.run(folder, "run", file, prepare=partial(processes.watch, ids_file(folder), 4))
    assert (code, f"stopped and saved at step 4 of {STUDENT_STEPS}" in output) == (75, True), output
    code, output = processes.run(folder, "resume", str(folder / "runs" / NAME))
    assert (code, "resumed at step 4" in output) == (0, True), output
    assert_same_run(whole, folder)
    scores = [(p / "runs" / NAME / "stages/02-student/ensemble-scores.jsonl").read_bytes() for p in (whole, folder)]
    assert scores[0] == scores[1]
    assert not list((folder / "runs" / NAME).glob(".offload*"))
    # where the teachers' weights are does not make another student
    code, output = processes.run(whole, "run", str(write_yaml(whole, stages=pool("offload"))))
    assert (code, "stage student: done" in output) == (0, True), output


def planned(folder: Path, backends: tuple[str, ...], **engine: Any) -> float:
    teachers = [{"name": f"t{i}", "model": "stage:teacher", "backend": b} for i, b in enumerate(backends)]
    config = tiny_config(folder, stages={"student": {"teachers": teachers}}, engine=engine)
    stage = mtkd.plan(config, memory=True).stages[1]
    assert [m.backend for m in stage.models] == ["", *backends]
    assert {m.parameters for m in stage.models[1:]} == {teacher_parameters(config)}
    assert stage.memory is not None
    return stage.memory.rank_gb * 1e9


def teacher_parameters(config: RunConfig) -> int:
    """GPT-2 of one layer of width 16 over 300 ids and 64 positions, head tied: written out."""
    width, ids, positions = 16, 300, config.data["text"].max_length
    layer = 12 * width**2 + 13 * width
    return (ids + positions) * width + layer + 2 * width


def test_the_plan_counts_one_offloaded_teacher(tmp_path: Path) -> None:
    """At the largest moment, when the student is compared with them, of those that wait one head is there."""
    one, head = teacher_parameters(tiny_config(tmp_path)) * 4, 300 * 16 * 4
    resident, offloaded = planned(tmp_path, ("resident",) * 4), planned(tmp_path, ("offload",) * 4)
    assert resident - offloaded == pytest.approx(4 * one - head)
    mixed = planned(tmp_path, ("resident", "offload", "offload", "resident"))
    assert resident - mixed == pytest.approx(2 * one - head)


def test_on_a_gpu_heads_and_the_next_body_stay() -> None:
    """The plan's bytes of offloaded teachers, written out for a GPU with and without prefetch, and a CPU."""
    teachers = [TeacherSize(100, 30, "offload"), TeacherSize(90, 40, "offload"), TeacherSize(7, 1, "resident")]
    on_gpu = Share(7 + 70 + 70, 7 + 70, host=2 * 190, built=7, passing=2 * 100)
    assert teacher_share(teachers, Place(True, False, 2, 2)) == on_gpu
    assert teacher_share(teachers, Place(True, True, 2, 2)) == replace(on_gpu, rank=7 + 70 + 70 + 50)
    assert teacher_share(teachers, Place(False, True, 2, 2)) == Share(7 + 100, 7 + 40, disk=190, built=7, passing=100)


def test_a_disk_without_room_is_refused_by_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    needed = 2 * teacher_parameters(tiny_config(tmp_path)) * 4
    monkeypatch.setattr(DISK, lambda _: usage(0, 0, needed))
    planned(tmp_path, ("offload", "offload", "resident"))
    monkeypatch.setattr(DISK, lambda _: usage(0, 0, needed - 1))
    with pytest.raises(UserError, match="no room for the offloaded teachers"):
        planned(tmp_path, ("offload", "offload", "resident"))
    planned(tmp_path, ("resident", "offload"))
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
