"""A run does not go on with other inputs than it began with, and says which ones changed (fault F18)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file, save_file
from tiny_run import NAME, ids_file, student_of_folder, with_teacher, write_data, write_yaml

from mtkd.engine.manifest import read_manifest, seal

pytestmark = pytest.mark.xdist_group("runs")  # they share an undisturbed run

RUN = f"runs/{NAME}"
TEACHER, STUDENT = f"{RUN}/stages/01-teacher", f"{RUN}/stages/02-student"


def metrics(folder: Path) -> str:
    return (folder / RUN / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def halfway(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the student alone, stopped at step 4."""
    folder = tmp_path_factory.mktemp("halfway")
    shutil.copytree(whole / "data", folder / "data")
    shutil.copytree(whole / TEACHER / "export", folder / "model" / "teacher")
    code, output = processes.run(
        folder, "run", student_of_folder(folder), prepare=partial(processes.watch, ids_file(folder), 4)
    )
    assert code == 75, output
    return folder


def other_field(folder: Path) -> str:
    return student_of_folder(folder, optimizer={"lr": 0.02})


def other_teacher(folder: Path) -> str:
    file = folder / "model/teacher/model.safetensors"
    weights = load_file(file)
    weights["transformer.ln_f.bias"][0] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    return student_of_folder(folder)


def other_data(folder: Path) -> str:
    file = folder / "data/validation.jsonl"
    file.write_text(file.read_text().replace("the", "one", 1))
    return student_of_folder(folder)


def other_tokenizer(folder: Path) -> str:
    """The same ids, but another rule for text, in the run's tokenizer (sealed again) and in the teacher's."""
    origin = read_manifest(folder / RUN / "tokenizer")["trained_on"]
    for tokenizer in (folder / RUN / "tokenizer", folder / "model/teacher"):
        file = tokenizer / "tokenizer_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "add_prefix_space": True}))
        backend = tokenizer / "tokenizer.json"
        rules = json.loads(backend.read_text())
        rules["normalizer"] = {"type": "Lowercase"}
        backend.write_text(json.dumps(rules))
    seal(folder / RUN / "tokenizer", {"trained_on": origin})
    return student_of_folder(folder)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (other_field, "stage.optimizer.lr: 0.01 -> 0.02"),
        (other_teacher, "models.'teacher teacher': "),
        (other_data, "data.fingerprint: "),
        (other_tokenizer, "tokenizer: "),
    ],
)
def test_resume_with_another_input_is_refused(
    halfway: Path, tmp_path: Path, change: Callable[[Path], str], difference: str
) -> None:
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    before = metrics(tmp_path)
    processes.assert_refused(tmp_path, ("run", change(tmp_path)), 3, "the checkpoint belongs to another", difference)
    assert metrics(tmp_path) == before


def test_bookkeeping_may_change_between_sessions(halfway: Path, whole: Path, tmp_path: Path) -> None:
    """The student of the local folder's teacher is also the student of the same teacher made by a stage."""
    shutil.copytree(halfway, tmp_path, dirs_exist_ok=True)
    student_of_folder(tmp_path, save_every=2, keep=1, evaluate_every=3)
    code, output = processes.run(tmp_path, "run", str(tmp_path / "run.yaml"), "-o", "log_every=1")
    assert (code, "resumed at step 4" in output) == (0, True), output
    weights = "model.safetensors"
    alone = tmp_path / RUN / "stages/01-student/export"
    assert (alone / weights).read_bytes() == (whole / STUDENT / "export" / weights).read_bytes()


def test_a_finished_stage_with_another_fingerprint_is_an_error(whole: Path, tmp_path: Path) -> None:
    with_teacher(whole, tmp_path)
    teacher = {"optimizer": {"lr": 0.02}, "student": {"dropout": 0.2}}
    file = write_yaml(tmp_path, stages={"teacher": teacher})
    differences = ("stage.optimizer.lr: 0.01 -> 0.02", "stage.student.dropout: 0.1 -> 0.2")
    processes.assert_refused(tmp_path, ("run", str(file)), 3, "this stage is finished, but with another", *differences)
    shutil.rmtree(tmp_path / "data")
    write_data(tmp_path / "data", seed=1)
    file = write_yaml(tmp_path)
    processes.assert_refused(tmp_path, ("run", str(file)), 3, "data.fingerprint: ", "tokenizer: ")
