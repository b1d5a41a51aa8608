"""DeepSpeed's buffers in /dev/shm: none stays, and none that a living process has mapped is taken away."""

from __future__ import annotations

import mmap
import os
import socket
from pathlib import Path

import pytest
import torch

from mtkd.engine.deepspeed_engine import init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.shared_memory import FOLDER, sweep
from mtkd.engine.testing import run_distributed

OURS = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500"


def old(path: Path, seconds: float = 3600.0) -> Path:
    path.write_bytes(b"x" * mmap.PAGESIZE)
    when = path.stat().st_mtime - seconds
    os.utime(path, (when, when))
    return path


def test_what_no_process_has_mapped_is_swept(tmp_path: Path) -> None:
    left, young = old(tmp_path / f"{OURS}_0"), old(tmp_path / f"{OURS}_1", 0.0)
    other = old(tmp_path / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_127.0.0.1_29500_0")
    held = old(tmp_path / f"{OURS}_2")
    with held.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        sweep(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([young, other, held])
    sweep(tmp_path)
    assert not held.exists()
    assert not left.exists()


def buffers(port: int) -> tuple[list[str], int]:
    """The buffers of a group that a launcher describes: how many have a name, and how many this process has mapped."""
    dist = Dist.current()
    torch.distributed.destroy_process_group()
    os.environ |= {"RANK": str(dist.rank), "WORLD_SIZE": str(dist.world_size), "LOCAL_RANK": str(dist.rank)}
    os.environ["LOCAL_SIZE"] = str(dist.world_size)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    init_distributed("cpu").barrier()
    mapped = Path("/proc/self/maps").read_text().count(f"_{port}_")
    return [path.name for path in FOLDER.glob(f"deepspeed_allreduce_buffer_*_{port}_*")], mapped


@pytest.mark.slow
def test_ranks_leave_no_buffer() -> None:
    """Looked at while they still run: a rank that is killed now leaves nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert run_distributed(buffers, 2, port) == [([], 2), ([], 2)]
