"""Starting the DeepSpeed launcher: `mtkd run` does it itself when a run wants several processes on this node."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from mtkd.config import EngineConfig

# Set by the launcher in each process it starts.
_RANK = "RANK"


def needs_launcher(config: EngineConfig) -> bool:
    """Whether this process must start the ranks instead of being one."""
    return config.kind == "deepspeed" and config.processes > 1 and _RANK not in os.environ


def launch_command(config: EngineConfig, arguments: Sequence[str], port: int | None = None) -> list[str]:
    """The launcher's command line that runs `mtkd ARGUMENTS` on every rank of this node."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(config.processes)]
    if port is not None:
        command += ["--master_port", str(port)]
    return [*command, "--no_local_rank", "--module", "mtkd", *arguments]


def launch(config: EngineConfig, arguments: Sequence[str]) -> int:
    """Run it; a signal that reaches us is handed on to the ranks. Returns their exit code."""
    environment = dict(os.environ)
    if config.device == "cpu" or (config.device == "auto" and not _has_gpu()):
        environment.setdefault("DS_ACCELERATOR", "cpu")
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.processes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(launch_command(config, arguments, port), env=environment, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        # To the ranks alone, so that they save: DeepSpeed's two launching processes would end at once and take the
        # exit code with them.
        ranks = _ranks(process.pid)
        for pid in ranks:
            os.kill(pid, number)
        if not ranks:
            os.killpg(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    code = process.wait()
    return code if code >= 0 else 128 - code  # as a shell tells that a signal ended it


def _ranks(launcher: int) -> list[int]:
    """Process ids of the ranks: the launcher starts one process for the node, and that one starts them."""
    import psutil

    node = psutil.Process(launcher).children()
    return [rank.pid for process in node for rank in process.children()]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
