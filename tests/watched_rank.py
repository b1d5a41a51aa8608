"""One rank of a small group of watched processes, with a fault in one of them; `test_faults_ranks.py` starts it.

The rank takes small steps until the fault, or for ever. What it says goes to the file ``output`` of its folder.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch

from mtkd.engine.dist import Dist, alive, leave
from mtkd.engine.watch import watched
from mtkd.errors import DataError, UserError, tell


def fail(fault: str) -> None:
    """What goes wrong in the one rank."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        os._exit(3)
    if fault == "bug":
        raise ValueError("a bug of this rank")
    if fault == "refused":
        raise DataError("a shard is missing", where="shard 1")
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "asleep":
        time.sleep(3600)
    if fault == "slow":
        for _ in range(24):  # batches without a collective
            time.sleep(0.4)
            alive()


def main(folder: Path, fault: str, bad: int, timeout: float) -> int:
    """Exit code of this rank."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=3600)
    )
    dist = Dist.current()
    (folder / "logs").mkdir(exist_ok=True)
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    try:
        with watched(dist, timeout, folder / "logs"):
            for step in range(40 if fault in ("none", "slow") else 100_000):
                dist.sum([1])
                if rank == bad and step == 20:
                    tell(f"{time.time()} fault")
                    fail(fault)
    except UserError as error:
        tell(f"mtkd: {error}")
        return error.exit_code
    except Exception:
        tell(traceback.format_exc())
        return 70
    return 0


def rank(folder: Path, fault: str, bad: int, timeout: float, number: int, world: int) -> None:
    """Be the rank `number` of `world`, a process of its own, until the end."""
    descriptor = os.open(folder / "output", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "GLOO_SOCKET_IFNAME": "lo"}
    leave(main(folder, fault, bad, timeout))
