"""Starting the ranks of a run: on this node, on this node as one of several, or on all of them by pdsh or srun.

A node's ranks are children of `deepspeed.launcher.launch`. `mtkd run` starts it itself: DeepSpeed's outer launcher says
0 when the inner one was killed. Only for pdsh the outer one is needed, which reaches the other nodes.
"""

from __future__ import annotations

import base64
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mtkd.config import EngineConfig
from mtkd.engine.hostfile import read_hostfile
from mtkd.engine.lock import holder
from mtkd.engine.orphans import adopting, end_session, end_with_parent
from mtkd.engine.stopping import stop_signals
from mtkd.errors import EXIT_LOST, UserError, is_secret, tell

# Set by the launcher in each process it starts.
_RANK = "RANK"
# Set by `mtkd run` in the tasks that it starts with srun, one on each node.
_NODE = "MTKD_NODE_TASK"
_DEFAULT_PORT = 29500
_WAIT_SECONDS = 120  # for the other nodes, when the first one has ended
# Of lines NAME=VALUE; DeepSpeed's pdsh launcher puts each of them on the nodes' command lines.
_ENVIRONMENT_FILE = ".deepspeed_env"


@dataclass(frozen=True)
class Node:
    """One node of several whose launchers do not know each other.

    Attributes:
        hosts: processes by node. rank: number of this node among them.
        address, port: where rank 0 can be reached.
    """

    hosts: Mapping[str, int]
    rank: int
    address: str
    port: int

    @property
    def processes(self) -> int:
        """Processes on this node."""
        return list(self.hosts.values())[self.rank]


@dataclass(frozen=True)
class Started:
    """What the command line says of where it was started (`--no_ssh --node_rank 0 --master_addr A --master_port P`)."""

    no_ssh: bool = False
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    def check(self, config: EngineConfig) -> None:
        """Refuse what does not fit together, or to the hostfile."""
        if self.master_port is not None and not 0 < self.master_port < 65536:
            raise UserError("not a port", where="--master_port", found=self.master_port, allowed="1 to 65535")
        if not self.no_ssh:
            if self.node_rank is not None:
                raise UserError("it numbers launchers that are started one by one", where="--node_rank",
                                todo="add --no_ssh, or leave it out")  # fmt: skip
            if config.hostfile is None and (self.master_addr is not None or self.master_port is not None):
                raise UserError("they are for several nodes", where="--master_addr, --master_port",
                                todo="name the nodes: -o engine.hostfile=FILE")  # fmt: skip
            return
        if config.hostfile is None:
            raise UserError("--no_ssh needs the list of nodes", where="engine.hostfile",
                            todo="-o engine.hostfile=FILE, the same file on every node")  # fmt: skip
        if config.launcher != "auto":
            raise UserError("--no_ssh starts one node; the launcher starts all", where="engine.launcher",
                            found=config.launcher, todo="leave one of them out")  # fmt: skip
        count = len(read_hostfile(config.hostfile))
        if self.node_rank is None or not 0 <= self.node_rank < count:
            raise UserError("the number of this node in the hostfile", where="--node_rank", found=self.node_rank,
                            allowed=f"0 to {count - 1}")  # fmt: skip


def needs_launcher(config: EngineConfig) -> bool:
    """Whether this process must start the ranks instead of being one."""
    several = config.processes > 1 or config.hostfile is not None or config.launcher != "auto"
    return config.kind == "deepspeed" and several and _RANK not in os.environ


def started_wrongly(config: EngineConfig, started: Started) -> None:
    """Refuse options for several nodes in a run of one process; in a rank they are its launcher's."""
    if _RANK not in os.environ and started != Started():
        raise UserError(
            "the run is one process",
            where="--no_ssh, --node_rank, --master_addr, --master_port",
            found=f"engine.kind: {config.kind}",
            todo="-o engine.kind=deepspeed -o engine.hostfile=FILE",
        )


def num_processes(config: EngineConfig) -> int:
    """Ranks of a run: what a launcher says, else the configuration; of Slurm's allocation, those of one node."""
    if _RANK in os.environ and config.kind == "deepspeed":
        return int(os.environ.get("WORLD_SIZE", 1))
    return sum(read_hostfile(config.hostfile).values()) if config.hostfile is not None else config.processes


def largest_node(config: EngineConfig) -> int:
    """The most ranks on one node, as far as the configuration tells."""
    return max(read_hostfile(config.hostfile).values()) if config.hostfile is not None else config.processes


def shown_command(config: EngineConfig) -> list[str]:
    """A command line that does what `mtkd run FILE` does, for `mtkd plan`."""
    run = ["mtkd", "run", "FILE"]
    if config.hostfile is not None:
        return ["deepspeed", "--hostfile", config.hostfile, "--no_local_rank", "--module", *run]
    if config.kind == "deepspeed" and config.processes > 1 and config.launcher == "auto":
        return ["deepspeed", "--num_gpus", str(config.processes), "--no_local_rank", "--module", *run]
    return run


def node_command(node: Node, arguments: Sequence[str]) -> list[str]:
    """The command line of a node's launcher, which runs `mtkd ARGUMENTS` as each of the node's ranks."""
    names = list(node.hosts)
    world = {name: list(range(count)) for name, count in node.hosts.items()}
    visible = list(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    if len(visible) >= node.processes:
        world[names[node.rank]] = visible[: node.processes]  # type: ignore[assignment]  # as they were given to us
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    launcher = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}"]
    launcher += [f"--node_rank={node.rank}", f"--master_addr={node.address}", f"--master_port={node.port}"]
    return [*launcher, "--no_local_rank", "--module", "mtkd", *arguments]


def launch(
    config: EngineConfig, arguments: Sequence[str], started: Started, folder: Path, finished: Callable[[], bool]
) -> int:
    """Start every rank this command is to start; a signal that reaches us is handed on to them.

    Args:
        arguments: of the `mtkd` command. folder: of the run.
        finished: whether the ranks did all of it, where no exit code tells.
    Returns:
        Their exit code.
    Raises:
        UserError: before anything is started.
    """
    started.check(config)
    if config.launcher == "slurm" and _NODE not in os.environ:
        return _wait(_srun_command(config, arguments), {**os.environ, _NODE: "1"}, _to_process)
    if config.hostfile is not None and not started.no_ssh:
        hosts = read_hostfile(config.hostfile)

        def stop(process: subprocess.Popen[bytes], number: int) -> None:
            if not _stop_main(folder / "LOCK", next(iter(hosts))):
                process.send_signal(number)

        code = _wait(_pdsh_command(config.hostfile, arguments, started), pdsh_environment(os.environ), stop)
        if code == 0 and not finished():  # what DeepSpeed's outer launcher says when pdsh was killed
            tell("mtkd: the launcher ended before the run did")
            return EXIT_LOST
        return code
    node = _this_node(config, started)
    return _wait(node_command(node, arguments), _node_environment(config, node), _to_ranks, sheltered=True)


def _this_node(config: EngineConfig, started: Started) -> Node:
    if started.no_ssh:
        assert config.hostfile is not None
        assert started.node_rank is not None
        hosts = read_hostfile(config.hostfile)
        address = started.master_addr or next(iter(hosts)).rpartition("@")[2]
        return Node(hosts, started.node_rank, address, started.master_port or _DEFAULT_PORT)
    if config.launcher == "slurm":
        shown = subprocess.run(
            ["scontrol", "show", "hostnames", _slurm("SLURM_JOB_NODELIST")], capture_output=True, text=True, check=True
        )
        hosts = dict.fromkeys(shown.stdout.split(), config.processes)
        port = started.master_port or 20000 + int(_slurm("SLURM_JOB_ID")) % 20000  # jobs that share a node differ
        return Node(hosts, int(_slurm("SLURM_NODEID")), next(iter(hosts)), port)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Node({"localhost": config.processes}, 0, "127.0.0.1", free.getsockname()[1])


def _slurm(name: str) -> str:
    if name not in os.environ:
        raise UserError(
            f"this is not a Slurm job: {name} is not set",
            where="engine.launcher",
            todo="submit it: sbatch launch/slurm.sh FILE",
        )
    return os.environ[name]


def _srun_command(config: EngineConfig, arguments: Sequence[str]) -> list[str]:
    """One task on every node of the allocation, which starts the node's ranks; srun hands the environment on itself."""
    _slurm("SLURM_JOB_NODELIST")
    nodes = _slurm("SLURM_JOB_NUM_NODES")
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    # Ranks end by themselves when one has ended, with its exit code; srun's way would be SIGKILL and another code.
    command += ["--kill-on-bad-exit=0", f"--wait={_WAIT_SECONDS}"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not inherit it from sbatch
        command.append(f"--cpus-per-task={cpus}")
    return [*command, sys.executable, "-m", "mtkd", *arguments]


def _pdsh_command(hostfile: str, arguments: Sequence[str], started: Started) -> list[str]:
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--launcher", "pdsh"]
    command += ["--force_multi", "--master_port", str(started.master_port or _DEFAULT_PORT)]
    if started.master_addr:
        command += ["--master_addr", started.master_addr]
    return [*command, "--no_local_rank", "--module", "mtkd", *map(_for_remote_shell, arguments)]


def _for_remote_shell(argument: str) -> str:
    """An argument that DeepSpeed, pdsh and the shell on the other node hand on as it is.

    DeepSpeed puts double quotes around what contains a space, and nothing around the rest; pdsh replaces `%h`.
    """
    if " " in argument:
        for special in "\\$`":
            argument = argument.replace(special, f"\\{special}")
    else:
        argument = shlex.quote(argument)
    return argument.replace("%", "%%")


def pdsh_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of DeepSpeed's pdsh launcher, without secrets.

    It writes variables of some names (MLFLOW..., PYTHON..., NCCL...) and every line of `.deepspeed_env` on the command
    line of ssh, where all users of both nodes can read them, and into the log.

    Raises:
        UserError: when `.deepspeed_env` holds a secret, or what DeepSpeed cannot read.
    """
    for folder in (Path.home(), Path.cwd()):
        file = folder / environment.get("DS_ENV_FILE", _ENVIRONMENT_FILE)
        for number, line in enumerate(file.read_text(errors="replace").splitlines() if file.is_file() else (), 1):
            name, equals, value = line.partition("=")
            if not equals:
                raise UserError("not NAME=VALUE: DeepSpeed could not read it", where=f"{file}:{number}")
            if is_secret(name.strip(), value):
                raise UserError(
                    "pdsh would write this secret on the command lines of all nodes",
                    where=f"{file}:{number}",
                    found=f"{name.strip()}=***",
                    todo="remove the line; keep it where its own program looks for it (`hf auth login` does), or use "
                    "launcher: slurm or --no_ssh, which hand the environment on unseen",
                )
    return {name: value for name, value in environment.items() if not is_secret(name, value)}


def _node_environment(config: EngineConfig, node: Node) -> dict[str, str]:
    environment = dict(os.environ)
    if config.device == "cpu" or (config.device == "auto" and not _has_gpu()):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // node.processes)))
    return environment


Stop = Callable[["subprocess.Popen[bytes]", int], None]


def _wait(command: Sequence[str], environment: Mapping[str, str], stop: Stop, sheltered: bool = False) -> int:
    """Run a launcher until it and everything below it has ended; `stop` hands on a signal. Its exit code."""
    with adopting():
        process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=end_with_parent(sheltered)
        )

        def forward(number: int, frame: FrameType | None) -> None:
            stop(process, number)

        before = {number: signal.signal(number, forward) for number in (*stop_signals(), signal.SIGINT)}
        try:
            code = process.wait()
            end_session(process.pid)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return _exit_code(code)


def _exit_code(code: int) -> int:
    """The exit code of `mtkd` for that of a launcher: a process that a signal ended is lost.

    DeepSpeed's launcher ends with the code of the rank that ended first; of one that signal n ended, the system makes
    256 - n of its -n.
    """
    if code < 0:
        tell(f"mtkd: the launcher was ended by signal {-code}; its processes were ended too")
        return EXIT_LOST
    if code > 256 - signal.NSIG:
        tell(f"mtkd: a rank was ended by signal {256 - code}; run it again to go on")
        return EXIT_LOST
    return code


def _to_process(process: subprocess.Popen[bytes], number: int) -> None:
    process.send_signal(number)


def _to_ranks(process: subprocess.Popen[bytes], number: int) -> None:
    """To the ranks alone, so that they save: DeepSpeed's launcher would end at once and take the exit code with it."""
    import psutil

    try:
        ranks = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return  # it has ended, and `end_session` ends what it left
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        process.kill()


def _stop_main(lock: Path, host: str) -> bool:
    """SIGTERM to the main rank, as the run's lock names it: all ranks save and end then. Whether it was sent."""
    try:
        words = (holder(lock) or "").split()
    except OSError:
        return False
    if len(words) < 4 or words[0] != "pid" or not words[1].isdecimal():
        return False
    command = ["kill", "-TERM", words[1]]
    if words[3].rstrip(",") != socket.gethostname():
        command = ["ssh", "-o", "BatchMode=yes", host, *command]
    return subprocess.run(command, check=False).returncode == 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
