"""What teachers need of memory and disk by their backend, from parameter counts alone."""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtkd.errors import UserError

FLOAT = 4
"""Bytes of a float32: the teachers' weights, whatever their file holds."""


@dataclass(frozen=True)
class TeacherSize:
    """Parameters of a teacher, those of its vocabulary-size output head among them, and where they live."""

    parameters: int
    head: int
    backend: str
    layers: int = 1


def teacher_bytes(teachers: Sequence[TeacherSize], *, on_gpu: bool, prefetch: bool) -> int:
    """Device memory of a stage's teachers, bytes: resident ones add up, of offloaded ones the largest counts.

    On a GPU the offloaded teachers' heads stay beside it until a micro-batch is done, and with `prefetch` the next
    body is there already; on a CPU the next one is read into the page cache, which is nobody's memory. A streamed
    teacher has one layer in memory, and its head while that is read.
    """
    total = sum(t.parameters for t in teachers if t.backend == "resident")
    streamed = [t for t in teachers if t.backend == "streamed"]
    total += max((-(-(t.parameters - t.head) // t.layers) for t in streamed), default=0)
    heads = [t.head for t in streamed]
    total += sum(heads) if on_gpu else max(heads, default=0)
    waiting = [t for t in teachers if t.backend == "offload"]
    if not on_gpu:
        return FLOAT * (total + max((t.parameters for t in waiting), default=0))
    bodies = sorted((t.parameters - t.head for t in waiting), reverse=True)
    return FLOAT * (total + sum(bodies[: 1 + prefetch]) + sum(t.head for t in waiting))


def check_offload(teachers: Sequence[TeacherSize], folder: Path, *, on_gpu: bool, where: str) -> None:
    """Refuse to offload where it cannot be done: no room on the disk, or a system that cannot give pages back.

    Args: folder: of the run, which may not exist yet.
    Raises:
        UserError: naming the stage.
    """
    needed = 0 if on_gpu else FLOAT * sum(t.parameters for t in teachers if t.backend == "offload")
    maps = needed or any(t.backend == "streamed" for t in teachers)
    if maps and not (hasattr(mmap, "MADV_DONTNEED") and hasattr(os, "posix_fadvise")):
        raise UserError(
            "streamed teachers, and offloaded ones on a CPU, need Linux: this system cannot give mapped pages back",
            where=where,
            todo="use backend: resident",
        )
    if not needed:
        return
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise UserError(
            "the disk has no room for the offloaded teachers, which are written there in float32",
            where=where,
            found=f"{free / 1e9:.1f} GB free in {there}",
            allowed=f"at least {needed / 1e9:.1f} GB",
            todo="make room, put `output` on another disk, or use backend: resident",
        )
