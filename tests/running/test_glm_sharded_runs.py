"""GLM's recipes in small as they are meant at full size: sharded teachers by two ranks, killed and resumed."""

from __future__ import annotations

import json
import signal
import socket
from pathlib import Path
from typing import Any

import processes
import pytest
import yaml
from golden_recipes import made_up_documents
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mtkd.models.glm import GLMForConditionalGeneration

RECIPES = Path(__file__).parents[2] / "configs" / "glm"
ENGINE = {"kind": "deepspeed", "processes": 2, "zero_stage": 3, "device": "cpu", "precision": "fp32", "threads": 1}


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


def start(file: Path) -> list[processes.Command]:
    """Both ranks, as the launcher starts them: each with its place in the environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    ranks = ({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2))
    return [processes.start(file.parent, "run", str(file), environment=rank, prepare=few_texts) for rank in ranks]


def few_texts() -> None:
    """In each rank: no reading of the whole Python library, which takes as long as a stage."""
    import mtkd.data.sources

    mtkd.data.sources.stdlib_documents = made_up_documents


def finish(ranks: list[processes.Command]) -> None:
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.output[-5000:] for rank in ranks)


def kill(ranks: list[processes.Command]) -> None:
    """As when the machine is switched off: no rank can do anything about the other's end."""
    for number in (signal.SIGSTOP, signal.SIGKILL):  # first none moves, then both are gone
        for rank in ranks:
            rank.send(number)
    assert [rank.wait() for rank in ranks] == [-signal.SIGKILL] * 2


def first_sealed(run: Path, stage: str, ranks: list[processes.Command]) -> None:
    """Wait until a stage has a whole checkpoint and is not done."""
    ranks[0].wait_for(lambda: bool(list(run.glob(f"stages/*-{stage}/checkpoints/step-*/MANIFEST.json"))))


def exported(run: Path) -> dict[str, dict[str, Any]]:
    return {file.parts[-3]: load_file(file) for file in sorted(run.glob("stages/*/export/model.safetensors"))}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "killed_in", "models"), [
    ("toy", "pretrain", {"teacher", "prediction", "labels-only"}),
    ("toy-chain", "student", {"published", "glm-7b", "student"}),
])  # fmt: skip
def test_a_recipe_is_killed_and_goes_on_to_its_end(tmp_path: Path, name: str, killed_in: str, models: set[str]) -> None:
    """All its processes are lost in a stage; started again, no stage before it is redone, and every model is there."""
    file = sharded(name, tmp_path)
    run = tmp_path / "runs" / f"glm-{name}"
    ranks = start(file)
    first_sealed(run, killed_in, ranks)
    kill(ranks)
    done = {each: each.stat().st_mtime_ns for each in run.glob("stages/*/DONE")}
    assert done
    assert not (next(run.glob(f"stages/*-{killed_in}")) / "DONE").exists()
    finish(start(file))
    assert all(each.stat().st_mtime_ns == before for each, before in done.items())
    assert len(exported(run)) == len(list((run / "stages").iterdir()))
    assert set(json.loads((run / "results.json").read_text())["models"]) == models
    folder = next(run.glob(f"stages/*-{killed_in}/export"))
    assert isinstance(AutoModelForCausalLM.from_pretrained(folder), GLMForConditionalGeneration)
