"""GLM's recipes in small as they are meant at full size: sharded teachers under the launcher, killed and resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtkd.models.glm import GLMForConditionalGeneration

RECIPES = Path(__file__).parents[1] / "configs" / "glm"
ENGINE = {"kind": "deepspeed", "processes": 2, "zero_stage": 3, "device": "cpu", "precision": "fp32", "threads": 1}
TIMEOUT = 1200  # seconds for a run of some steps


def sharded(name: str, folder: Path) -> Path:
    """A toy recipe with few documents and steps, every teacher sharded, a checkpoint at every step."""
    values = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    values |= {"output": str(folder / "runs"), "engine": ENGINE}
    for data in values["data"].values():
        data["limit"] = {"train": 40, "validation": 6, "test": 12}
    for stage in values["stages"].values():
        stage |= {"steps": 3, "save_every": 1}
        stage["teachers"] = [{"model": path, "backend": "sharded"} for path in stage.get("teachers", [])]
    if "chain" in values:
        chain = values["chain"]
        chain |= {"steps": 3, "save_every": 1, "backend": "sharded", "direct": False}
        chain["teachers"] = [{"model": path, "backend": "sharded"} for path in chain["teachers"]]
    values["evaluate"] = {**values.get("evaluate", {}), "resamples": 50}
    file = folder / f"{name}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def start(file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mtkd", "run", str(file)]
    return subprocess.Popen(command, stdout=(file.parent / "output.txt").open("ab"), stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[bytes], file: Path) -> None:
    code = process.wait(TIMEOUT)
    assert code == 0, (file.parent / "output.txt").read_text()[-5000:]


def kill_all_below(process: subprocess.Popen[bytes]) -> None:
    """As when the machine is switched off: nobody gets to say anything."""
    below = psutil.Process(process.pid).children(recursive=True)
    for each in [psutil.Process(process.pid), *below]:
        each.send_signal(signal.SIGSTOP)  # first nobody moves, then all are gone
    for each in [*below, psutil.Process(process.pid)]:
        each.kill()
    psutil.wait_procs(below, timeout=200)
    process.wait(200)


def first_sealed(run: Path, stage: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a stage has a whole checkpoint and is not done."""
    limit = time.monotonic() + TIMEOUT
    while not list(run.glob(f"stages/*-{stage}/checkpoints/step-*/MANIFEST.json")):
        assert process.poll() is None, (run.parents[1] / "output.txt").read_text()[-5000:]
        assert time.monotonic() < limit
        time.sleep(0.01)


def exported(run: Path) -> dict[str, dict[str, Any]]:
    return {file.parts[-3]: load_file(file) for file in sorted(run.glob("stages/*/export/model.safetensors"))}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("name", "killed_in", "models"), [
    ("toy", "pretrain", {"teacher", "prediction", "labels-only"}),
    ("toy-chain", "student", {"published", "glm-7b", "student"}),
])  # fmt: skip
def test_a_recipe_is_killed_and_goes_on_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, killed_in: str, models: set[str]
) -> None:
    """All its processes are lost in a stage; started again, no stage before it is redone, and every model is there."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = sharded(name, tmp_path)
    run = tmp_path / "runs" / f"glm-{name}"
    process = start(file)
    first_sealed(run, killed_in, process)
    kill_all_below(process)
    done = {each: each.stat().st_mtime_ns for each in run.glob("stages/*/DONE")}
    assert done
    assert not (next(run.glob(f"stages/*-{killed_in}")) / "DONE").exists()
    finish(start(file), file)
    assert all(each.stat().st_mtime_ns == before for each, before in done.items())
    assert len(exported(run)) == len(list((run / "stages").iterdir()))
    assert set(json.loads((run / "results.json").read_text())["models"]) == models
    folder = next(run.glob(f"stages/*-{killed_in}/export"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GLMForConditionalGeneration)
