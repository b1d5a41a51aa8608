"""Runs over several nodes: two real ones on this machine, what their launchers are told, ranks that do not agree."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import NAME, tiny_config, write_yaml
from two_nodes import enter, two_nodes, why_not

import mtkd.running.agreement
from mtkd.config import EngineConfig
from mtkd.config.read import load_config
from mtkd.engine.dist import Dist
from mtkd.engine.hostfile import read_hostfile
from mtkd.engine.launch import Started, launch, needs_launcher, num_processes, pdsh_environment, shown_command
from mtkd.engine.seal import newest_sealed
from mtkd.engine.testing import run_distributed
from mtkd.errors import EXIT_LOST, DataError, UserError
from mtkd.running.identity import check_checkpoint

TEACHER_BACKEND = "resident"  # on the two nodes; the undisturbed run has a resident one
STUDENT = f"runs/{NAME}/stages/02-student"


# Two nodes

ENGINE = {"kind": "deepspeed", "zero_stage": 3, "device": "cpu", "timeout_seconds": 3600}
# Seconds in which a node must end that another one has left: a few, ten times as many on a busy machine, and far fewer
# than without the watch.
SOON = 200
# Without dropout, whose noise depends on which process sees a sequence: one process must come to the same.
STAGES = {
    "teacher": {"student": {"dropout": 0.0}},
    "student": {
        "student": {"dropout": 0.0},
        "steps": 24,
        "save_every": 2,
        "keep": 2,
    },
}


def outcome(folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Weights of the student, and the perplexity of every model."""
    results = json.loads((folder / f"runs/{NAME}/results.json").read_text())
    perplexities = {name: model["overall"]["perplexity"] for name, model in results["models"].items()}
    return load_file(folder / STUDENT / "export/model.safetensors"), perplexities


@pytest.mark.slow
def test_two_nodes_lose_one_and_go_on_to_the_end_of_an_undisturbed_run(tmp_path: Path) -> None:
    """The second node is switched off in the middle; both are started again, this time by DeepSpeed's own command.

    The undisturbed run is one process of the other engine.
    """
    if reason := why_not():
        pytest.skip(reason)
    for name in ("whole", "nodes"):
        (tmp_path / name).mkdir()
    code, output = processes.run(tmp_path, "run", str(write_yaml(tmp_path / "whole", stages=STAGES)))
    assert code == 0, output

    folder, hosts = tmp_path / "nodes", tmp_path / "hostfile"
    hosts.write_text("# two nodes\nnode-a slots=1\nnode-b slots=1\n")
    teacher = {"name": "teacher", "model": "stage:teacher", "backend": TEACHER_BACKEND}
    stages = {**STAGES, "student": {**STAGES["student"], "teachers": [teacher]}}
    file = write_yaml(folder, engine={**ENGINE, "hostfile": str(hosts)}, stages=stages)
    with two_nodes() as nodes:
        place = ["--no_ssh", "--master_addr", nodes.addresses[0], "--master_port", "29507"]
        commands = [
            processes.start(
                tmp_path,
                *("run", str(file), *place, "--node_rank", str(number)),
                environment={"GLOO_SOCKET_IFNAME": nodes.cards[number]},
                prepare=partial(enter, nodes.names[number]),
            )
            for number in (0, 1)
        ]
        saved = folder / STUDENT / "checkpoints"
        commands[0].wait_for(lambda: (saved / "step-000004").exists())
        nodes.switch_off(1)
        begun = time.monotonic()
        assert commands[0].wait() == EXIT_LOST, commands[0].output
        assert time.monotonic() - begun < SOON
        assert "mtkd: rank 1 (pid " in commands[0].output
        assert "ended without a word" in commands[0].output
        assert nodes.pids(0) == []
        step = newest_sealed(saved).manifest["step"]
        assert 4 <= step < 24

        again = [
            processes.start(
                tmp_path,
                *("--hostfile", str(hosts), *place, "--node_rank", str(number), "--module", "mtkd", "run", str(file)),
                environment={"GLOO_SOCKET_IFNAME": nodes.cards[number]},
                prepare=partial(enter, nodes.names[number]),
                program=("-m", "deepspeed.launcher.runner"),
            )
            for number in (0, 1)
        ]
        assert [command.wait() for command in again] == [0, 0], "".join(command.output for command in again)
        assert f"resumed at step {step} from" in again[0].output
    (weights, perplexities), (expected, of_one) = outcome(folder), outcome(tmp_path / "whole")
    assert perplexities == pytest.approx(of_one, rel=1e-4)
    for key, value in expected.items():
        torch.testing.assert_close(weights[key], value, atol=1e-4, rtol=0)
    logs = [(folder / f"runs/{NAME}/logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    run_id = json.loads((folder / f"runs/{NAME}/env.json").read_text())["run_id"]
    assert [log.count(f"run {run_id}: rank {rank} of 2") for rank, log in enumerate(logs)] == [2, 2]


# Ranks that do not agree (F27)


def differing(folder: str) -> list[str]:
    """On each of two ranks: what a run says when rank 1 was given other values, and when only its clock differs."""
    rank = int(os.environ["RANK"])
    import mtkd.running.run

    mtkd.running.run.write_report = lambda path: path / "report.html"
    said = []
    for name, changes in [("options", ["stages.teacher.steps=9", "seed=5"]), ("redo", []), ("fine", [])]:
        file = Path(folder) / name / "run.yaml"
        config = load_config(file, changes if rank else ())
        if rank and name == "fine":
            mtkd.running.agreement.datetime = LateClock  # type: ignore[attr-defined]
        try:
            mtkd.running.run.run(config, ["teacher"] if rank and name == "redo" else [])
            said.append(json.loads((config.folder / "env.json").read_text())["run_id"])
        except UserError as error:
            said.append(str(error))
    return said


class LateClock:
    """A clock that is years behind."""

    @staticmethod
    def now(zone: Any) -> Any:
        from datetime import datetime

        return datetime(2001, 1, 1, tzinfo=zone)


@pytest.mark.slow
def test_ranks_that_were_started_differently_name_what_differs(tmp_path: Path) -> None:
    """F27: options, --redo and clocks; each rank says the same and there is one run id."""
    for name in ("options", "redo", "fine"):
        (tmp_path / name).mkdir()
        stages = {"teacher": {"steps": 1}, "student": None}
        evaluate = {"ensembles": [], "comparisons": []}
        write_yaml(tmp_path / name, engine={"kind": "deepspeed"}, stages=stages, evaluate=evaluate)
    first, second = run_distributed(differing, 2, str(tmp_path), timeout=1200)
    assert first == second  # every rank tells the same, and there is one run id
    assert "rank 0 on " in first[0]
    assert "-> rank 1 on " in first[0]
    assert "seed: 0 -> 5" in first[0]
    assert "stages.teacher.steps: 1 -> 9" in first[0]
    assert "--redo[0]: (absent) -> 'teacher'" in first[1]
    assert first[2][:2] == "20"
    assert not first[2].startswith("2001")


def unshared(parent: str) -> str:
    """On each of two ranks, which see different folders under the same name."""
    dist = Dist.current()
    mtkd.running.agreement._SEEN_AFTER = 1.0
    mtkd.running.agreement.check_shared(dist, Path(parent))
    mtkd.running.agreement._listed = lambda mark: dist.is_main  # type: ignore[assignment]
    with pytest.raises(UserError) as caught:
        mtkd.running.agreement.check_shared(dist, Path(parent))
    return str(caught.value)


@pytest.mark.slow
def test_a_run_folder_that_is_not_shared_is_refused_on_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(unshared, 2, str(tmp_path))
    assert first == second
    assert "the run's folder is not shared by all nodes" in first
    assert f"not seen on {os.uname().nodename}" in first
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("saved", "now", "command"),
    [
        (("deepspeed", 2, 2), ("deepspeed", 1, 2), "-o engine.processes=2 -o engine.zero_stage=2"),
        (("deepspeed", 1, 3), ("deepspeed", 2, 3), "-o engine.processes=1 -o engine.zero_stage=3"),
        (("torch", 1, 0), ("deepspeed", 2, 0), "mtkd run FILE -o engine.kind=torch\n"),
    ],
)
def test_a_checkpoint_of_other_processes_is_refused_with_the_command_that_goes_on(
    saved: tuple[str, int, int], now: tuple[str, int, int], command: str
) -> None:
    """F16, 2 -> 1 and 1 -> 2."""
    old, new = (dict(zip(("engine", "world_size", "zero_stage"), values, strict=True)) for values in (saved, now))
    with pytest.raises(DataError) as caught:
        check_checkpoint("student", {**old, "identity": {"seed": 0}}, {"seed": 0}, new)
    assert command in str(caught.value)
    assert "--redo student" in str(caught.value)
    with pytest.raises(DataError, match="seed: 0 -> 1"):
        check_checkpoint("student", {**old, "identity": {"seed": 0}}, {"seed": 1}, old)
    check_checkpoint("student", {**old, "identity": {"seed": 0}}, {"seed": 0}, old)


# What the launchers are told


def test_a_hostfile_is_read_as_deepspeed_reads_it(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    file = tmp_path / "hosts"
    file.write_text("# comment\n\nnode-1 slots=8\n  me@node-2.example   slots=4\n10.0.0.3 slots=1 # the old one\n")
    assert read_hostfile(str(file)) == dict(fetch_hostfile(str(file)))
    assert num_processes(EngineConfig(kind="deepspeed", hostfile=str(file))) == 13


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no node"),
        ("node-1 slots=8\nnode-1 slots=4", "hosts:2: the node is there twice"),
        ("node-1", "hosts:1: not a node and its processes"),
        ("node-1 slots=0", "hosts:1: not a node and its processes"),
        ("node-1;reboot slots=1", "hosts:1: not a node and its processes"),
        ("-oProxyCommand=x slots=1", "hosts:1: not a node and its processes"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=told):
        read_hostfile(str(tmp_path / "hosts"))


@pytest.mark.parametrize(
    ("engine", "told"),
    [
        ({"kind": "torch", "hostfile": "h"}, "hostfile and launcher need kind: deepspeed"),
        ({"kind": "torch", "launcher": "slurm"}, "hostfile and launcher need kind: deepspeed"),
        ({"kind": "deepspeed", "launcher": "pdsh"}, "launcher: pdsh needs a hostfile"),
        ({"kind": "deepspeed", "launcher": "slurm", "hostfile": "h"}, "leave out hostfile"),
        ({"kind": "deepspeed", "processes": 2, "hostfile": "h"}, "exclude each other"),
        ({"kind": "deepspeed", "timeout_seconds": 0}, "timeout_seconds"),
        ({"kind": "deepspeed", "launcher": "mpi"}, "auto"),
    ],
)
def test_nonsense_about_nodes_is_refused_at_load(tmp_path: Path, engine: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        tiny_config(tmp_path, engine=engine)


@pytest.mark.parametrize(
    ("options", "engine", "told"),
    [
        (["--no_ssh", "--node_rank", "0"], {}, "the run is one process"),
        (["--node_rank", "0"], {"kind": "deepspeed", "hostfile": "hosts"}, "add --no_ssh"),
        (["--no_ssh"], {"kind": "deepspeed", "hostfile": "hosts"}, "allowed: 0 to 1"),
        (["--no_ssh", "--node_rank", "2"], {"kind": "deepspeed", "hostfile": "hosts"}, "allowed: 0 to 1"),
        (["--no_ssh", "--node_rank", "0"], {"kind": "deepspeed", "processes": 2}, "needs the list of nodes"),
        (["--master_port", "70000"], {"kind": "deepspeed", "hostfile": "hosts"}, "1 to 65535"),
        ([], {"kind": "deepspeed", "hostfile": "nowhere"}, "there is no such file"),
        ([], {"kind": "deepspeed", "launcher": "slurm"}, "this is not a Slurm job"),
    ],
)
def test_a_wrong_start_is_refused_before_anything_is_started(
    tmp_path: Path, options: list[str], engine: dict[str, str], told: str
) -> None:
    (tmp_path / "hosts").write_text("node-a slots=1\nnode-b slots=1\n")
    if "hostfile" in engine:
        engine = {**engine, "hostfile": str(tmp_path / engine["hostfile"])}
    processes.assert_refused(tmp_path, ("run", str(write_yaml(tmp_path, engine=engine)), *options), 2, told)
    assert not (tmp_path / "runs").exists()


def test_the_plan_shows_a_command_that_a_user_can_type(tmp_path: Path) -> None:
    """For one process, several, a hostfile and Slurm."""
    (tmp_path / "hosts").write_text("node-a slots=3\nnode-b slots=1\n")
    for engine, command in [
        ({}, "mtkd run FILE"),
        ({"kind": "deepspeed", "processes": 2}, "deepspeed --num_gpus 2 --no_local_rank --module mtkd run FILE"),
        (
            {"kind": "deepspeed", "hostfile": str(tmp_path / "hosts")},
            f"deepspeed --hostfile {tmp_path}/hosts --no_local_rank --module mtkd run FILE",
        ),
        ({"kind": "deepspeed", "launcher": "slurm", "processes": 8}, "mtkd run FILE"),
    ]:
        assert " ".join(shown_command(EngineConfig(**engine))) == command
    assert not needs_launcher(EngineConfig(kind="deepspeed"))
    assert needs_launcher(EngineConfig(kind="deepspeed", launcher="slurm"))


def fake(folder: Path, name: str, text: str) -> None:
    """A program of this name on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!{sys.executable}\nimport json, os, subprocess, sys\n{text}\n")
    (folder / name).chmod(0o755)


SECRETS = {
    "MLFLOW_TRACKING_TOKEN": "mlflow-of-nobody",
    "MLFLOW_TRACKING_URI": "https://me:pa55word@host/x",
    "PYTHON_API_KEY": "key-of-nobody",
    "HF_TOKEN": "hf_abcdefghijklmnop",
    "WANDB_API_KEY": "wandb-of-nobody",
}


@pytest.mark.slow
def test_over_pdsh_arguments_arrive_and_secrets_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line that would go over ssh, as DeepSpeed's own launcher makes it, read by a real shell."""
    programs, seen = tmp_path / "bin", tmp_path / "seen"
    fake(programs, "ssh", "print('10.0.0.1')")
    fake(programs, "pdsh", f"open({str(seen)!r}, 'w').write(json.dumps([sys.argv, dict(os.environ)]))")
    (tmp_path / "hosts").write_text("node-a slots=2\nnode-b slots=2\n")
    for name, value in {**SECRETS, "MLFLOW_RUN_NAME": "public"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    tricky = ["a b", "it's", "$HOME", "x=`id`", '{a: 1, b: "$x"}', "100%h", "back\\slash", "*"]
    config = EngineConfig(kind="deepspeed", hostfile=str(tmp_path / "hosts"))
    code = launch(config, ["run", *tricky], Started(), tmp_path / "runs/none", lambda: False)
    assert code == EXIT_LOST  # pdsh said nothing of a failure, but the run is not done
    line, environment = json.loads(seen.read_text())
    text = " ".join(line)
    assert "export MLFLOW_RUN_NAME=public" in text
    for name, value in SECRETS.items():
        assert name not in text
        assert value not in text
        assert value not in environment.values()
    assert line[line.index("-w") :][:2] == ["-w", "node-a,node-b"]
    remote = " ".join(line[line.index("-w") + 2 :]).split(" mtkd run ", 1)[1].replace("%%", "%")
    shell = ["sh", "-c", f"{sys.executable} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' {remote}"]
    assert json.loads(subprocess.run(shell, check=True, capture_output=True, text=True).stdout) == tricky


def test_secrets_in_deepspeeds_environment_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = tmp_path / ".deepspeed_env"
    file.write_text("HF_HOME=/shared/hf\n")
    assert pdsh_environment({"A": "1", "HF_TOKEN": "x"}) == {"A": "1"}
    for line, told in [("HF_TOKEN=hf_secretsecret", "this secret"), ("nonsense", "not NAME=VALUE")]:
        file.write_text(f"HF_HOME=/shared/hf\n{line}\n")
        with pytest.raises(UserError, match=told) as caught:
            pdsh_environment({})
        assert f"{file}:2" in str(caught.value)
        assert "hf_secretsecret" not in str(caught.value)


def test_slurm_starts_a_launcher_on_every_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun is a script that does what the real one does: the command once for each node, with its number."""
    programs, seen = tmp_path / "bin", tmp_path / "seen"
    fake(programs, "scontrol", "print('node-1\\nnode-2')")
    fake(
        programs,
        "srun",
        f"""
command = [a for a in sys.argv[1:] if not a.startswith("--")]
for node in "01":
    subprocess.run(command, env={{**os.environ, "SLURM_NODEID": node}}, check=True)
open({str(seen / "srun")!r}, "w").write(json.dumps(sys.argv[1:]))
""",
    )
    seen.mkdir()
    job = {
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "0",
    }
    for name, value in {**job, "SLURM_CPUS_PER_TASK": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    # in the place of `python -m mtkd`, this one's command without the rest of mtkd
    program = f"""
import json, os, sys
import mtkd.engine.launch as launcher
from mtkd.config import EngineConfig
from pathlib import Path
def wait(command, environment, stop, sheltered):
    Path({str(seen)!r}, os.environ["SLURM_NODEID"]).write_text(json.dumps(command))
    return 0
config = EngineConfig(kind="deepspeed", launcher="slurm", processes=8, device="cpu")
launcher._wait = wait
sys.exit(launcher.launch(config, ["run", "FILE"], launcher.Started(), Path("."), lambda: True))
"""
    script = tmp_path / "mtkd_task.py"
    script.write_text(program)
    (programs / "python").write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {script}\n")
    (programs / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    config = EngineConfig(kind="deepspeed", launcher="slurm", processes=8)
    assert launch(config, ["run", "FILE"], Started(), tmp_path, lambda: True) == 0
    options = json.loads((seen / "srun").read_text())
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--kill-on-bad-exit=0", "--cpus-per-task=4"} <= {*options}
    for node in (0, 1):
        command = json.loads((seen / str(node)).read_text())
        assert f"--node_rank={node}" in command
        assert "--master_addr=node-1" in command
        assert f"--master_port={20000 + 123456 % 20000}" in command


def test_a_launcher_of_several_processes_needs_the_engine_for_them(tmp_path: Path) -> None:
    """`kind: torch` under a launcher would train the same model several times."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    code, output = processes.run(tmp_path, "run", str(write_yaml(tmp_path)), environment=environment)
    assert (code, "engine.kind: a launcher started several processes" in output) == (2, True), output
