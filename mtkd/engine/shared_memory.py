"""DeepSpeed's buffers in /dev/shm, 35 MB for each rank on a CPU: DeepSpeed creates them and never removes them.

A mapped file lives on without its name. The names are therefore removed as soon as every rank has mapped all buffers:
a rank that is killed later leaves nothing. What was left before that moment is swept at the next start.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

FOLDER = Path("/dev/shm")
_NAME = "deepspeed_allreduce_buffer"
_YOUNG = 60.0
"""Seconds in which a buffer without a process may still be mapped by the one that has just created it."""


def drop_name(rank: int) -> None:
    """Remove the name of this rank's buffer; after every rank has mapped it."""
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    with suppress(OSError):
        (FOLDER / f"{_NAME}_{os.getuid()}_{address}_{port}_{rank}").unlink()


def sweep(folder: Path = FOLDER) -> None:
    """Remove this user's buffers that no living process has mapped: those of ranks that were killed at their start."""
    left = [path for path in folder.glob(f"{_NAME}_{os.getuid()}_*") if _is_old(path)]
    mapped = _mapped(folder) if left else set()
    for path in left:
        if str(path) not in mapped:
            with suppress(OSError):
                path.unlink()


def _is_old(path: Path) -> bool:
    try:
        facts = path.lstat()
    except OSError:
        return False
    return facts.st_uid == os.getuid() and time.time() - facts.st_mtime > _YOUNG


def _mapped(folder: Path) -> set[str]:
    """The buffers below `folder` that processes have mapped, as far as this user may look."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended, or is another user's
            lines = maps.read_text(errors="replace").splitlines()
            mapped |= {line[line.index("/") :] for line in lines if f"{folder}/{_NAME}" in line}
    return mapped
