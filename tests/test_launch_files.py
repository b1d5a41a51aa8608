"""Everything in launch/ holds: shell and YAML parse, the JSON is what the code makes, commands are real ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import write_yaml
from typer.testing import CliRunner

from mtkd.cli.app import app
from mtkd.config import OptimizerConfig
from mtkd.engine.deepspeed_engine import deepspeed_config
from mtkd.engine.hostfile import read_hostfile
from mtkd.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_LOST, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_USAGE

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"


def scripts() -> list[Path]:
    """Every file that a shell reads."""
    return [p for p in LAUNCH.iterdir() if p.is_file() and (p.suffix == ".sh" or p.read_text().startswith("#!"))]


@pytest.mark.parametrize("file", scripts(), ids=lambda file: file.name)
def test_a_shell_can_read_it(file: Path) -> None:
    if not file.read_text().splitlines()[0].endswith("python3"):
        subprocess.run(["bash", "-n", str(file)], check=True)
    if file.name != "environment.sh":  # which is sourced
        assert os.access(file, os.X_OK)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_zero_files_are_what_the_engine_uses(stage: int) -> None:
    """For 4 nodes of 8 processes and the default optimizer; see launch/README.md for the way to write them anew."""
    made = deepspeed_config(OptimizerConfig(), zero_stage=stage, accumulate=1, world_size=32)
    assert json.loads((LAUNCH / f"zero{stage}.json").read_text()) == made


def test_the_example_of_a_hostfile_is_one() -> None:
    assert list(read_hostfile(str(LAUNCH / "hostfile.example")).values()) == [8, 8, 8, 8]


def kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return service, job["spec"]


def test_the_job_of_kubernetes_fits_together() -> None:
    service, job = kubernetes()
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    nodes = next(e["value"] for e in container["env"] if e["name"] == "NODES")
    assert job["completions"] == job["parallelism"] == int(nodes)
    assert pod["subdomain"] == service["metadata"]["name"]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    failing = next(rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    assert failing["values"] == [EXIT_USAGE, EXIT_DATA, EXIT_NON_FINITE, EXIT_INTERNAL]
    assert not {EXIT_LOST, EXIT_PREEMPTED} & {*failing["values"]}  # these go on when they are started again
    assert not [e for e in container["env"] if "TOKEN" in e["name"] and "value" in e]


def test_the_pods_shell_writes_a_hostfile_and_calls_mtkd_as_it_is(tmp_path: Path) -> None:
    """Its script, run by a shell, with a program in the place of `mtkd` that tells its arguments."""
    _, job = kubernetes()
    (container,) = job["template"]["spec"]["containers"]
    script = container["args"][0].replace("/tmp/hostfile", str(tmp_path / "hostfile"))
    (tmp_path / "mtkd").write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    (tmp_path / "mtkd").chmod(0o755)
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "2"}
    done = subprocess.run([*container["command"], script], env=environment, check=True, capture_output=True, text=True)
    said = json.loads(done.stdout)
    assert list(read_hostfile(str(tmp_path / "hostfile")).items())[2] == ("mtkd-2.mtkd", 8)
    assert said[said.index("--node_rank") + 1] == "2"
    assert_runs(said, tmp_path)


def test_the_script_for_slurm_asks_for_one_task_a_node_and_time_to_save(tmp_path: Path) -> None:
    """With programs in the places of `mtkd` and `scontrol`: the job queues itself again after a save, and only then."""
    text = (LAUNCH / "slurm.sh").read_text()
    assert {"--ntasks-per-node=1", "--signal=TERM@120", "--requeue"} <= set(re.findall(r"^#SBATCH (\S+)", text, re.M))
    for code, queued in [(75, True), (0, False), (71, False), (3, False)]:
        (tmp_path / ".venv/bin").mkdir(parents=True, exist_ok=True)
        for name, line in [
            ("mtkd", f'echo "$@" > {tmp_path}/said; exit {code}'),
            ("scontrol", f"touch {tmp_path}/queued"),
        ]:
            (tmp_path / ".venv/bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (tmp_path / ".venv/bin" / name).chmod(0o755)
        environment = {"PATH": os.environ["PATH"], "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
        done = subprocess.run(["bash", str(LAUNCH / "slurm.sh"), "FILE"], env=environment, cwd=tmp_path, check=False)
        assert (done.returncode, (tmp_path / "queued").exists()) == (code, queued)
        (tmp_path / "queued").unlink(missing_ok=True)
    said = shlex.split((tmp_path / "said").read_text())
    assert "engine.processes=8" in said
    assert_runs(said, tmp_path, launcher="slurm")


def assert_runs(arguments: list[str], folder: Path, launcher: str = "auto") -> None:
    """`mtkd ARGUMENTS` is a call that mtkd understands, up to the file that it names."""
    overrides = [value for option, value in pairwise(arguments) if option == "-o"]
    file = write_yaml(folder)
    command = ["validate", str(file), *(part for value in overrides for part in ("-o", value))]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert (launcher == "auto") == ("engine.launcher=slurm" not in overrides)
    known = CliRunner().invoke(app, ["run", "--help"], terminal_width=200).output
    for option in (a for a in arguments if a.startswith("--")):
        assert option in known


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_the_images_copy_what_is_there_and_what_the_package_needs(name: str) -> None:
    text = (LAUNCH / name).read_text().replace("\\\n", " ")
    copied = [word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]]
    assert all((ROOT / path).exists() for path in copied)
    assert {"mtkd", "teachers", "pyproject.toml", "README.md", "LICENSE"} <= {*copied}
    installs = [line for line in text.splitlines() if "pip install" in line]
    assert all(line.count("pip install") == line.count("-c launch/constraints.txt") for line in installs)
    assert "://" not in text  # no index of packages that only exists somewhere
    known = re.compile(r"^(#|FROM|ARG|RUN|ENV|WORKDIR|COPY|USER|ENTRYPOINT|CMD|$)")
    assert all(known.match(line) for line in text.splitlines())


def test_the_guide_names_files_and_options_that_exist() -> None:
    text = (LAUNCH / "README.md").read_text()
    for path in re.findall(r"launch/([\w.-]*\w)(?![{\w])", text):
        assert (LAUNCH / path).exists() or path in ("hostfile", "README.md"), path
    for key in re.findall(r"(?<!mtkd\.)engine\.(\w+)", text):
        from mtkd.config import EngineConfig

        assert key in EngineConfig.model_fields, key
    known = CliRunner().invoke(app, ["run", "--help"], terminal_width=200).output
    for option in set(re.findall(r"--(?:no_ssh|node_rank|master_\w+)", text)):
        assert option in known
    assert shutil.which("bash")


@pytest.mark.xdist_group("a-group")
def test_groups_of_tests_stay_together(request: pytest.FixtureRequest) -> None:
    """`launch/test` has two workers: one of them gets all tests of a group, which share a costly fixture."""
    if not request.config.getoption("loadgroup", False):  # set in xdist's workers
        pytest.skip("not run by workers that take groups")
    assert request.node.nodeid.endswith("@a-group")
