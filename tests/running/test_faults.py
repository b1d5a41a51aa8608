"""What a run must survive or refuse: broken checkpoints, hostile files, kills, signals, two runs on one folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import processes
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_run import NAME, ids_file, student_of_folder, with_teacher, write_yaml

from mtkd.engine.seal import MANIFEST, newest_sealed, seal

pytestmark = pytest.mark.xdist_group("runs")  # they share an undisturbed run

RUN = f"runs/{NAME}"
TEACHER, STUDENT = f"{RUN}/stages/01-teacher", f"{RUN}/stages/02-student"


def unfinished(whole: Path, folder: Path) -> tuple[str, Path]:
    """A run whose student has checkpoints of steps 3, 6 and 8 but is not done: its YAML file, and their folder."""
    file = with_teacher(whole, folder)
    shutil.copytree(whole / STUDENT / "checkpoints", folder / STUDENT / "checkpoints")
    return str(file), folder / STUDENT / "checkpoints"


def exported(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / STUDENT / "export").iterdir()}


def metrics(folder: Path) -> str:
    return (folder / RUN / "metrics.jsonl").read_text()


# Broken checkpoints (F06, F22)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def swap_steps(file: Path) -> None:
    shutil.copy(file.parent.parent / "step-000003" / file.name, file)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (flip_a_bit, "the content differs from what was sealed"),
        (truncate, "wrong size"),
        (Path.unlink, "the file is missing"),
        (swap_steps, "the content differs from what was sealed"),
    ],
)
def test_a_broken_checkpoint_is_passed_over(
    whole: Path, tmp_path: Path, damage: Callable[[Path], None], reason: str
) -> None:
    file, checkpoints = unfinished(whole, tmp_path)
    damage(checkpoints / "step-000008" / "state-rank-0.pt")
    (checkpoints / "latest").write_text("../../../etc")  # a hint that nobody reads
    code, output = processes.run(tmp_path, "run", file)
    assert code == 0, output
    assert f"{checkpoints}/step-000008/state-rank-0.pt: {reason}" in output.replace("\n", " ")
    assert "resumed at step 6 from step-000006" in output
    assert exported(tmp_path) == exported(whole)


def test_nothing_but_broken_checkpoints_is_an_error(whole: Path, tmp_path: Path) -> None:
    file, checkpoints = unfinished(whole, tmp_path)
    for path in checkpoints.iterdir():
        truncate(path / "state-rank-0.pt")
    before = metrics(tmp_path)
    for command in (("run", file), ("resume", str(tmp_path / RUN))):
        code, output = processes.run(tmp_path, *command)
        assert (code, "none of them is whole" in output) == (3, True), output
        assert "step-000008/state-rank-0.pt: wrong size" in output
        assert "remove this folder to train the stage from its beginning" in output
    assert metrics(tmp_path) == before
    assert not (tmp_path / STUDENT / "export").exists()


def test_resume_with_nothing_usable_is_an_error(whole: Path, tmp_path: Path) -> None:
    with_teacher(whole, tmp_path)
    (tmp_path / TEACHER / "DONE").unlink()
    shutil.rmtree(tmp_path / TEACHER / "checkpoints")
    processes.assert_refused(tmp_path, ("resume", str(tmp_path / RUN)), 3, "nothing to resume")
    processes.assert_refused(tmp_path, ("resume", str(tmp_path)), 2, "not the folder of a run")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_in_a_checkpoint_is_not_executed(whole: Path, tmp_path: Path) -> None:
    file, checkpoints = unfinished(whole, tmp_path)
    newest, marker = checkpoints / "step-000008", tmp_path / "executed"
    torch.save({"objective": Payload(marker)}, newest / "state-rank-0.pt")
    manifest = json.loads((newest / MANIFEST).read_bytes())
    seal(newest, {key: value for key, value in manifest.items() if key not in ("format", "files", "sha256")})
    processes.assert_refused(tmp_path, ("run", file), 3, "more than tensors and plain values; it was not executed")
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()  # it would have worked


# The end of a stage (F19)


def die_before_done() -> None:
    from mtkd.engine.folder import StageDir

    def die(folder: StageDir, record: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    StageDir.mark_done = die  # type: ignore[method-assign, assignment]


def test_a_kill_between_export_and_done_costs_nothing(whole: Path, tmp_path: Path) -> None:
    command = ("run", str(with_teacher(whole, tmp_path)))
    code, output = processes.run(tmp_path, *command, prepare=die_before_done)
    assert code == -signal.SIGKILL, output
    assert exported(tmp_path) == exported(whole)
    trained = metrics(tmp_path)
    code, output = processes.run(tmp_path, *command)
    assert (code, "resumed at step 8" in output) == (0, True), output
    assert exported(tmp_path) == exported(whole)
    assert losses(metrics(tmp_path)) == losses(trained)

    before = times(tmp_path / RUN)
    code, output = processes.run(tmp_path, *command)
    assert (code, output.count("skipped")) == (0, 2), output
    after = times(tmp_path / RUN)
    assert {path for path in before | after if before.get(path) != after.get(path)} <= {"env.json", "LOCK"}


def losses(text: str) -> list[str]:
    return [line for line in text.splitlines() if '"loss"' in line]


def times(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# The run folder and its neighbours (F08, F24, F26)


def load_no_model() -> None:
    import mtkd.running.models

    def refuse(*args: object, **options: object) -> None:
        os._exit(99)

    mtkd.running.models.build_model = refuse  # type: ignore[assignment]


def test_an_unwritable_run_folder_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, text in [("file", "cannot be written"), ("file/below", "cannot be written"), (".", "is not a run")]:
        file = write_yaml(tmp_path, output=str(tmp_path / output), **({"name": "data"} if output == "." else {}))
        code, printed = processes.run(tmp_path, "run", str(file), prepare=load_no_model)
        assert (code, text in printed) == (2, True), printed
    # the trap works
    code, _ = processes.run(tmp_path, "run", str(write_yaml(tmp_path)), prepare=load_no_model)
    assert code == 99


SECRETS = ("hf_abcdefghijklmnop", "ghp_qrstuvwxyz0123456", "pa55-of-nobody", "wandb-0123456789abcdef")


def pretend_arguments() -> None:
    """As if a script that calls `mtkd.run` had been given tokens of its own."""
    import mtkd.running.run

    check = mtkd.running.run.check

    def pretend(config: Any) -> None:
        sys.argv = ["train.py", "--hf-token", SECRETS[0], f"--url=https://me:{SECRETS[2]}@host/x", SECRETS[1]]
        check(config)

    mtkd.running.run.check = pretend


def test_no_token_reaches_the_run_folder(tmp_path: Path) -> None:
    environment = {"HF_TOKEN": SECRETS[0], "GITHUB_TOKEN": SECRETS[1], "WANDB_API_KEY": SECRETS[3]}
    code, output = processes.run(
        tmp_path, "run", str(write_yaml(tmp_path)), environment=environment, prepare=pretend_arguments, report=True
    )
    assert code == 0, output
    files = [path for path in (tmp_path / RUN).rglob("*") if path.is_file()]
    assert {"env.json", "report.html", "metrics.jsonl"} <= {path.name for path in files}
    assert "train.py" in (tmp_path / RUN / "env.json").read_text()
    for secret in SECRETS:
        assert secret not in output
        assert [path for path in files if secret.encode() in path.read_bytes()] == []


def test_two_runs_on_one_folder(whole: Path, tmp_path: Path) -> None:
    """The second is refused with the first one's process id; when that one is killed, the run goes on."""
    command = ("run", str(with_teacher(whole, tmp_path)))
    freeze = partial(processes.watch, ids_file(tmp_path), 5, signal.SIGSTOP)
    holder = processes.start(tmp_path, *command, prepare=freeze)
    holder.wait_for(
        lambda: Path(ids_file(tmp_path)).exists() and len(Path(ids_file(tmp_path)).read_text().split("\n")) > 5
    )
    for second in (command, ("resume", str(tmp_path / RUN))):
        code, output = processes.run(tmp_path, *second)
        assert (code, f"found:   pid {holder.process.pid} on " in output) == (2, True), output
    holder.send(signal.SIGKILL)
    assert holder.wait() == -signal.SIGKILL
    code, output = processes.run(tmp_path, *command)
    assert (code, "resumed at step 3" in output) == (0, True), output
    assert exported(tmp_path) == exported(whole)


# Numbers and files that are not what they should be (F17, F23), and their exit codes


def test_numbers_that_are_not_finite_end_the_run(whole: Path, tmp_path: Path) -> None:
    """At the step, with the stage and exit code 64; the last finite checkpoint stays."""
    file = with_teacher(whole, tmp_path, stages={"student": {"optimizer": {"lr": 1e30}, "save_every": 1}})
    processes.assert_refused(tmp_path, ("run", str(file)), 64, "not finite at step 2", "stages.student: ")
    newest = tmp_path / STUDENT / "checkpoints"
    assert [path.name for path in newest.iterdir()] == ["step-000001"]
    weights = torch.load(newest / "step-000001/state-rank-0.pt", weights_only=True)["objective"]
    assert all(value.isfinite().all() for value in weights.values())


def nan_weights(model: Path, outside: Path) -> str:
    weights = load_file(model / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return "the teacher's weights are not finite\n  found:   transformer.ln_f.weight"


def shard_outside(model: Path, outside: Path) -> str:
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"transformer.wte.weight": "../../outside"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return "../../outside"


def link_outside(model: Path, outside: Path) -> str:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors").symlink_to(outside)
    return "a link leaves the model folder"


def remote_code(model: Path, outside: Path) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    (model / "evil.py").write_text(f"open({str(outside)!r}).read()")
    return "remote code is off"


@pytest.mark.parametrize("harm", [nan_weights, shard_outside, link_outside, remote_code])
def test_a_harmful_teacher_folder_is_refused(whole: Path, tmp_path: Path, harm: Callable[[Path, Path], str]) -> None:
    shutil.copytree(whole / "data", tmp_path / "data")
    shutil.copytree(whole / TEACHER / "export", tmp_path / "model/teacher")
    outside = tmp_path / "outside"
    os.mkfifo(outside)  # whoever opens it waits for ever
    text = harm(tmp_path / "model/teacher", outside)
    processes.assert_refused(tmp_path, ("run", student_of_folder(tmp_path)), 3, text)


def test_exit_codes_of_the_real_command(tmp_path: Path) -> None:
    """Not through the fork server: what a shell sees."""
    file = write_yaml(tmp_path)
    (tmp_path / "data/train.jsonl").write_text('{"text": "fine"}\n{"text": 3}\n')
    for arguments, code, text in [(["-o", "stepz=3"], 2, "stepz"), ([], 3, "line 2")]:
        command = [sys.executable, "-m", "mtkd", "run", str(file), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == code, done.stderr
        assert text in done.stderr


@pytest.mark.slow
def test_a_signal_to_the_launcher_stops_every_rank_after_a_save(tmp_path: Path) -> None:
    """F09: `mtkd run` of two ranks is told to stop: one sealed checkpoint, exit code 75, no process left."""
    engine = {"kind": "deepspeed", "processes": 2, "zero_stage": 2}
    file = write_yaml(tmp_path, engine=engine, stages={"teacher": {"steps": 100_000, "save_every": 3}})
    command = processes.start(tmp_path, "run", str(file))
    assert command.process.pid is not None
    checkpoints = tmp_path / TEACHER / "checkpoints"
    command.wait_for(lambda: (checkpoints / "step-000003").exists())
    started = psutil.Process(command.process.pid).children(recursive=True)
    assert len(started) >= 3  # the node's launcher, two ranks
    command.send(signal.SIGTERM)
    assert command.wait() == 75, command.output
    assert [process for process in started if process.is_running()] == []
    found = newest_sealed(checkpoints)
    assert found.skipped == []
    assert f"stopped and saved at step {found.manifest['step']} of 100000" in command.output
