"""F16: a run without ZeRO goes on with more or fewer processes, every sample once; a sharded one is refused."""

from __future__ import annotations

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file
from sharded_runs import Job, _set_traps
from tiny_run import NAME, STUDENT_STEPS, ids_file, write_yaml

from mtkd.config.read import load_config
from mtkd.engine.jsonlines import read_jsonl
from mtkd.engine.testing import run_distributed
from mtkd.errors import Preempted
from mtkd.running.state import regrouped

STOP = 5  # steps before the stop
# Without dropout, whose noise depends on which process sees a sequence.
MODEL = {"architecture": "gpt2", "layers": 1, "width": 8, "heads": 2, "dropout": 0.0}


def write(folder: Path) -> Path:
    folder.mkdir()
    teacher = {**MODEL, "width": 16}
    stages = {"teacher": {"student": teacher, "steps": 1}, "student": {"student": MODEL, "save_every": 4}}
    return write_yaml(folder, engine={"kind": "deepspeed", "zero_stage": 0}, stages=stages, log_every=3)


def first_one_then_the_other(parent: str) -> list[str]:
    """On each of two ranks: a run that is stopped, and one that another number of processes has begun."""
    import mtkd.running.run

    mtkd.running.run.write_report = lambda path: path / "report.html"
    _set_traps(Job("two-to-one", 0, stop=STOP))
    ends = []
    for name in ("two-to-one", "one-to-two"):
        try:
            mtkd.running.run.run(load_config(Path(parent) / name / "run.yaml"))
            ends.append("done")
        except Preempted:
            ends.append("stopped")
        _set_traps(Job("", 0, stop=-1))
    return ends


@pytest.mark.slow
def test_two_processes_go_on_as_one_and_one_as_two(tmp_path: Path) -> None:
    """The same examples in the same order; weights and losses to rounding."""
    file = {name: str(write(tmp_path / name)) for name in ("whole", "two-to-one", "one-to-two")}
    for name, stop, code in (("whole", 0, 0), ("one-to-two", STOP, 75)):
        watch = partial(processes.watch, ids_file(tmp_path / name), stop, signal.SIGTERM)
        assert processes.run(tmp_path, "run", file[name], prepare=watch)[0] == code
    ends = run_distributed(first_one_then_the_other, 2, str(tmp_path), timeout=1200)
    assert ends == [["stopped", "done"]] * 2
    watch = partial(processes.watch, ids_file(tmp_path / "two-to-one"))
    code, output = processes.run(tmp_path, "run", file["two-to-one"], prepare=watch)
    assert (code, f"resumed at step {STOP}" in output) == (0, True), output

    seen = {name: Path(ids_file(tmp_path / name)).read_text().splitlines() for name in ("whole", "two-to-one")}
    assert [json.loads(line) for line in seen["two-to-one"]] == [json.loads(line) for line in seen["whole"][-3:]]
    assert len(seen["whole"]) == 1 + STUDENT_STEPS
    assert STUDENT_STEPS - STOP == 3
    weights, losses = {}, {}
    for name in file:
        run = tmp_path / name / "runs" / NAME
        weights[name] = load_file(run / "stages/02-student/export/model.safetensors")
        losses[name] = [
            line["loss"] for line in read_jsonl(run / "metrics.jsonl") if line["stage"] == "student" and "loss" in line
        ]
    for name in ("two-to-one", "one-to-two"):
        assert losses[name] == pytest.approx(losses["whole"], abs=1e-3), os.linesep.join(map(str, losses.values()))
        for key, value in weights["whole"].items():
            torch.testing.assert_close(weights[name][key], value, atol=1e-3, rtol=0)


def twice_without_seeing_it(parent: str) -> list[dict[str, Any]]:
    """On each of two ranks: a run and the same again; rank 1 sees no DONE and no results, as over NFS at first."""
    import mtkd.running.run
    from mtkd.engine.folder import StageDir

    mtkd.running.run.write_report = lambda path: path / "report.html"
    if int(os.environ["RANK"]) == 1:
        there = Path.exists
        StageDir.done = lambda self: None
        Path.exists = lambda self, **kwargs: self.name != "results.json" and there(self, **kwargs)
    config = load_config(Path(parent) / "run.yaml")
    return [mtkd.running.run.run(config).stages for _ in range(2)]


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_files_of_others_yet_goes_with_them(tmp_path: Path) -> None:
    file = write(tmp_path / "late")
    main, other = run_distributed(twice_without_seeing_it, 2, str(file.parent), timeout=1200)
    assert main[0] == main[1] == other[1]
    assert list(main[0]) == ["teacher", "student"]
    assert {name: facts["fingerprint"] for name, facts in other[0].items()} == {
        name: facts["fingerprint"] for name, facts in main[0].items()
    }


def test_the_meters_of_other_processes_keep_their_sums() -> None:
    """However many processes there were and are: sums over all of them stay."""
    two = [{"sums": {"loss": 1.0, "kl": 0.5}, "seen": 4}, {"sums": {"loss": 2.0, "kl": 0.25}, "seen": 4}]
    assert regrouped(two, 2) == two
    assert regrouped(two, 1) == [{"sums": {"loss": 3.0, "kl": 0.75}, "seen": 4}]
    three = regrouped(two, 3)
    assert [meter["sums"]["loss"] for meter in three] == [3.0, 0.0, 0.0]
    assert {meter["seen"] for meter in three} == {4}
    assert regrouped([], 3) == []
