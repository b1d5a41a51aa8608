"""Stop and resume is bit-equal to never having stopped (faults F01, F02, F04), in whole runs of the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from sharded_runs import Job, do, student_of, write_runs
from tiny_run import NAME, STUDENT_STEPS, TEACHER_STEPS, ids_file, with_teacher, write_yaml

from mtkd.config.read import load_config
from mtkd.engine.folder import RunDir
from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.seal import check_seal, newest_sealed
from mtkd.engine.testing import RankError, run_distributed

shared = pytest.mark.xdist_group("runs")  # they share an undisturbed run

STUDENT = f"runs/{NAME}/stages/02-student"
CLOCK = {"time", "seconds"}


def losses(folder: Path) -> dict[tuple[str, int, bool], dict[str, Any]]:
    """The last metrics line of each kind, step and stage, without clock times."""
    lines = read_jsonl(folder / "runs" / NAME / "metrics.jsonl")
    return {
        (line["stage"], line["step"], "loss" in line): {k: v for k, v in line.items() if k not in CLOCK}
        for line in lines
    }


def saved_steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / STUDENT / "checkpoints").glob("step-*"))


def last_state(folder: Path) -> dict[str, Any]:
    """Everything in the checkpoint of the last step but clock times: file -> content."""
    checkpoint = folder / STUDENT / "checkpoints" / f"step-{STUDENT_STEPS:06d}"
    # DeepSpeed's files hold more than tensors; these were written by the test itself.
    files = [name for name in check_seal(checkpoint)["files"] if name.endswith(".pt")]
    loop = json.loads((checkpoint / "state.json").read_text())
    return {
        **{name: torch.load(checkpoint / name, weights_only=False) for name in files},
        "loop": {key: value for key, value in loop.items() if key not in CLOCK},
    }


def assert_equal(one: Any, other: Any, where: str) -> int:
    """Equal in every value, bit by bit; returns the number of tensors that were compared."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert torch.equal(one, other), where
        return 1
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        return sum(assert_equal(one[key], other[key], f"{where}.{key}") for key in one)
    if isinstance(one, list | tuple):
        assert len(one) == len(other), where
        return sum(assert_equal(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True)))
    if hasattr(one, "__dict__") and not isinstance(one, type | Enum):
        return assert_equal(vars(one), vars(other), where)
    assert one == other, where
    return 0


def assert_same_run(whole: Path, folder: Path) -> None:
    """Last checkpoint (parameters, optimizer, random states, position), export and every logged number are equal."""
    # GPT-2 of one layer has 16 parameters and the tied head; Adam keeps three tensors for each; and the random states.
    assert assert_equal(last_state(whole), last_state(folder), "checkpoint") > 10
    exports = [{p.name: p.read_bytes() for p in (place / STUDENT / "export").iterdir()} for place in (whole, folder)]
    assert exports[0] == exports[1]
    assert losses(whole) == losses(folder)


@shared
@pytest.mark.parametrize(
    "stops", [(4,), (6, 8), (1, 2, 5)], ids=["mid-epoch", "epoch's end and last step", "three times in one epoch"]
)
def test_stop_and_resume_is_bit_equal(whole: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    command = ("run", str(with_teacher(whole, tmp_path)))
    for stop in stops:
        code, output = processes.run(tmp_path, *command, prepare=partial(processes.watch, ids_file(tmp_path), stop))
        assert (code, f"stopped and saved at step {stop} of {STUDENT_STEPS}" in output) == (75, True), output
        assert saved_steps(tmp_path)[-1] == stop
        command = ("resume", str(tmp_path / "runs" / NAME))
    code, output = processes.run(tmp_path, *command, prepare=partial(processes.watch, ids_file(tmp_path)))
    assert (code, f"resumed at step {stops[-1]}" in output) == (0, True), output
    assert_same_run(whole, tmp_path)
    ids = [read_lines(Path(ids_file(place))) for place in (whole, tmp_path)]
    assert ids[0][TEACHER_STEPS:] == ids[1]


def read_lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


@shared
def test_an_epoch_has_every_example_once(whole: Path) -> None:
    drawn = [json.loads(line) for line in read_lines(Path(ids_file(whole)))]
    epoch = [example for batches in drawn[TEACHER_STEPS:][:6] for batch in batches for example in batch]
    assert sorted(epoch) == list(range(48))
    assert drawn[TEACHER_STEPS] != drawn[TEACHER_STEPS + 6]


@shared
def test_kills_while_saving_fall_back_to_the_last_sealed_checkpoint(whole: Path, tmp_path: Path) -> None:
    """One run killed at six points of its saves, restarted each time (F04), each time at the checkpoint sealed last."""
    file = with_teacher(whole, tmp_path)
    checkpoints = tmp_path / STUDENT / "checkpoints"
    for point, sealed in [
        ("before-shard@3", 0),
        ("after-shard@3", 0),
        ("after-rename@3", 3),
        ("before-manifest@6", 3),
        ("after-manifest@6", 3),
        ("while-pruning@3", 6),
    ]:
        if point.startswith("while-pruning"):
            write_yaml(tmp_path, stages={"student": {"keep": 1}})
        before = newest_sealed(checkpoints).path
        code, output = processes.run(tmp_path, "run", str(file), environment={"MTKD_TEST_KILL_AT": point})
        assert code == -9, output
        assert ("resumed" not in output) if before is None else (f"from {before.name}" in output), (point, output)
        after = newest_sealed(checkpoints)
        assert (after.manifest.get("step", 0), after.skipped) == (sealed, []), point
    code, output = processes.run(tmp_path, "run", str(write_yaml(tmp_path)))
    assert (code, "resumed at step 6" in output) == (0, True), output
    assert_same_run(whole, tmp_path)
    assert [p.name for p in checkpoints.iterdir() if p.name[0] == "."] == []  # nothing half is left behind


# DeepSpeed: two processes. Starting them is what costs time, so each pair does several runs.

JOBS = [
    Job("zero-0", 0, stop=4),
    Job("zero-2", 2, stop=6),
    Job("zero-3", 3, stop=4),
    Job("early", 3, stop=7, early=True),
    Job("killed", 3, kill="after-rename@6"),
]
UNDISTURBED = {"zero-0": "zero-0", "zero-2": "zero-2", "zero-3": "zero-3", "killed": "zero-3"}


def sharded(function: Any) -> Any:
    """Marks of a test that needs the runs below."""
    return pytest.mark.slow(pytest.mark.xdist_group("sharded-runs")(function))


@dataclass(frozen=True)
class Sharded:
    """Runs of each ZeRO stage: undisturbed, stopped, and resumed in fresh processes.

    Attributes:
        held, huge, full: what each rank was told when another process held the run, when the learning rate was 1e30,
            and when rank 1 had no disk space.
        stopped: per job the steps of its checkpoints when it was stopped or killed.
    """

    whole: Path
    disturbed: Path
    held: list[str]
    huge: list[str]
    full: list[str]
    stopped: dict[str, list[int]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Sharded:
    whole, disturbed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("disturbed")
    jobs = [
        Job("held", 0),
        *(Job(job.name, job.zero_stage, early=job.early) for job in JOBS[:4]),
        Job("huge", 2, lr=1e30),
    ]
    jobs.append(Job("full", 2, full_disk=True))
    write_runs(whole, jobs)
    config = load_config(whole / "held" / "run.yaml")
    with RunDir.create(config, base=Path(config.output)).lock():
        ends = run_distributed(do, 2, str(whole), jobs, timeout=1200)
    assert [rank[1:5] for rank in ends] == [["done"] * 4] * 2

    write_runs(disturbed, JOBS)
    with pytest.raises(RankError, match="rank 0 ended with exit code -9"):
        run_distributed(do, 2, str(disturbed), JOBS, timeout=1200)
    stopped = {job.name: saved_steps(disturbed / job.name) for job in JOBS}
    again = [Job(job.name, job.zero_stage, early=job.early) for job in JOBS]
    assert run_distributed(do, 2, str(disturbed), again, timeout=1200) == [["done"] * 5] * 2
    return Sharded(whole, disturbed, *([rank[i] for rank in ends] for i in (0, 5, 6)), stopped)


@sharded
@pytest.mark.parametrize("name", UNDISTURBED)
def test_sharded_runs_resume_bit_equal(runs: Sharded, name: str) -> None:
    assert runs.stopped[name] == {"zero-0": [3, 4], "zero-2": [3, 6], "zero-3": [3, 4], "killed": [3, 6]}[name]
    assert_same_run(runs.whole / UNDISTURBED[name], runs.disturbed / name)


@sharded
def test_sharded_runs_end_early_and_export_the_best_step(runs: Sharded) -> None:
    """One decision for both ranks, by a metric that only the main one has; the same after a resume."""
    place = student_of(runs.whole, "early")
    done, again = (json.loads((student_of(f, "early") / "DONE").read_text()) for f in (runs.whole, runs.disturbed))
    lines = read_jsonl(place.parents[1] / "metrics.jsonl")
    scores = {line["step"]: line["validation/perplexity"] for line in lines if "validation/perplexity" in line}
    best = min(scores, key=lambda step: scores[step])
    assert (done["exported_step"], done["steps"]) == (best, best + 4)
    assert done["ended"].startswith("early stop: perplexity")
    assert (again["exported_step"], again["steps"], again["ended"]) == (best, best + 4, done["ended"])
    models = [(student_of(f, "early") / "export/model.safetensors").read_bytes() for f in (runs.whole, runs.disturbed)]
    assert models[0] == models[1]


@sharded
def test_a_held_run_is_refused_on_every_rank(runs: Sharded) -> None:
    for told in runs.held:
        assert told.startswith("UserError")
        assert f"another process is working in this run\n  found:   pid {os.getpid()} on " in told


@sharded
def test_a_full_disk_on_one_rank_stops_every_rank(runs: Sharded) -> None:
    """DeepSpeed's save has barriers inside: the rank that fails must still take part in them."""
    for told in runs.full:
        assert told.startswith("UserError")
        assert "rank 1: OSError: [Errno 28] No space left on device (free: " in told
    checkpoints = student_of(runs.whole, "full").parent / "01-teacher" / "checkpoints"
    assert list(checkpoints.iterdir()) == []


PLAIN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
answers = []
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(f"{folder}/export", output_loading_info=True)
    probe = torch.load(f"{folder}/probe.pt", weights_only=True)
    with torch.no_grad():
        difference = float((model.eval()(probe["ids"]).logits - probe["logits"]).abs().max())
    tied = model.lm_head.weight is model.transformer.wte.weight
    tokens = AutoTokenizer.from_pretrained(f"{folder}/export")("the teacher")["input_ids"]
    answers.append([[str(value) for value in info.values() if value], difference, tied, len(tokens) > 0])
print(json.dumps([answers, "mtkd" in sys.modules]))
"""


@sharded
def test_sharded_exports_load_in_plain_transformers(runs: Sharded) -> None:
    """F20: untied (teacher) and tied (student) heads trained under ZeRO-3; nothing missing, the same logits."""
    student = student_of(runs.whole, "zero-3")
    command = [sys.executable, "-c", PLAIN, str(student.parent / "01-teacher"), str(student)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout
    answers, mtkd_imported = json.loads(answer.splitlines()[-1])
    assert not mtkd_imported
    for expected_tied, (problems, difference, tied, tokenizer_works) in zip((False, True), answers, strict=True):
        assert problems == []
        assert difference <= 1e-5
        assert tied is expected_tied
        assert tokenizer_works


@sharded
def test_numbers_that_are_not_finite_stop_every_rank(runs: Sharded) -> None:
    for told in runs.huge:
        assert told.startswith("NonFiniteError: ")
        assert "stages.teacher: a loss or gradient is not finite at step 2" in told
