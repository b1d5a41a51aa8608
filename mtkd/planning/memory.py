"""What stays in memory during a stage, from parameter counts: teachers by backend, what trains by stage of ZeRO.

A backend is one function of `BACKENDS`; `mtkd.planning.footprint` counts what comes and goes within a step.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtkd.config import EngineConfig
from mtkd.engine.deepspeed_engine import LARGEST_BUCKET
from mtkd.errors import UserError

FLOAT = 4
"""Bytes of a float32: the weights of student and teachers, whatever their file holds."""

_PREFETCHED, _LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults at ZeRO 3: numbers gathered ahead, and numbers that may stay gathered."""


@dataclass(frozen=True)
class TeacherSize:
    """Parameters of a teacher, those of its vocabulary-size output head among them, and where they live.

    Attributes:
        ahead: sharded: numbers that are gathered before their layer runs.
        waits: sharded: where a rank's part is: "none" (on its device), "cpu" or "nvme".
    """

    parameters: int
    head: int
    backend: str
    layers: int = 1
    ahead: int = 20_000_000
    waits: str = "none"

    @property
    def layer(self) -> int:
        """Parameters of one layer, all being equal; other tables of embeddings count among them."""
        return -(-(self.parameters - self.head) // self.layers)


@dataclass(frozen=True)
class Place:
    """Where a stage runs. Attributes: ranks: in all; local: of them on one host; prefetch: `engine.prefetch`."""

    on_gpu: bool
    prefetch: bool = True
    ranks: int = 1
    local: int = 1


@dataclass(frozen=True)
class Share:
    """Bytes of the teachers' weights.

    Attributes:
        rank: on a rank's device while the teachers run. after: there while the student learns from what they said.
        host: in the host's memory per host, beside what ranks on a CPU hold there. disk: in files.
    """

    rank: float = 0
    after: float = 0
    host: float = 0
    disk: float = 0

    def __add__(self, other: Share) -> Share:
        return Share(self.rank + other.rank, self.after + other.after, self.host + other.host, self.disk + other.disk)


def _resident(teachers: Sequence[TeacherSize], place: Place) -> Share:
    whole = FLOAT * sum(t.parameters for t in teachers)
    return Share(whole, whole)


def _offload(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """The largest one counts: of a GPU in pinned memory, and the heads stay until a micro-batch is done; of a CPU in a
    file, whose pages in the kernel's cache are nobody's memory."""
    whole, heads = FLOAT * sum(t.parameters for t in teachers), FLOAT * sum(t.head for t in teachers)
    if not place.on_gpu:
        largest, head = max(t.parameters for t in teachers), max(t.head for t in teachers)
        return Share(FLOAT * largest, FLOAT * head, disk=whole)
    bodies = sorted((t.parameters - t.head for t in teachers), reverse=True)
    return Share(FLOAT * sum(bodies[: 1 + place.prefetch]) + heads, heads, host=whole * place.local)


def _sharded(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """A part of each on every rank; the layer that runs and what is gathered ahead of it; each head once, whole."""
    away = ("cpu", "nvme") if place.on_gpu else ("nvme",)  # a CPU's memory is the host's
    parts = sum(t.parameters for t in teachers if t.waits not in away) / place.ranks
    pinned = sum(t.parameters for t in teachers if t.waits == "cpu") if place.on_gpu else 0
    files = sum(t.parameters for t in teachers if t.waits == "nvme")
    gathered = max(min(t.layer + t.ahead, t.parameters) for t in teachers)
    after = parts + sum(t.head for t in teachers)
    here = place.local / place.ranks  # of all parts, on one host
    return Share(FLOAT * (after + gathered), FLOAT * after, FLOAT * pinned * here, FLOAT * files * here)


def _streamed(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """The layer that runs; the heads, of a CPU one at a time. Weights stay in their own files."""
    heads = FLOAT * (sum(t.head for t in teachers) if place.on_gpu else max(t.head for t in teachers))
    return Share(FLOAT * max(t.layer for t in teachers) + heads, heads)


def _cached(teachers: Sequence[TeacherSize], place: Place) -> Share:
    return Share()


BACKENDS: Mapping[str, Callable[[Sequence[TeacherSize], Place], Share]] = {
    "resident": _resident,
    "offload": _offload,
    "sharded": _sharded,
    "streamed": _streamed,
    "cached": _cached,
}


def teacher_share(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """What the weights of a stage's teachers take."""
    total = Share()
    for backend, function in BACKENDS.items():
        of_it = [t for t in teachers if t.backend == backend]
        total += function(of_it, place) if of_it else Share()
    return total


@dataclass(frozen=True)
class Trained:
    """Bytes on a rank of what trains.

    Attributes:
        optimizer: moments, and from ZeRO 1 on the float32 copy that they belong to.
        buckets: DeepSpeed's buffers, and what ZeRO 3 has gathered.
        gradients: where they do not come and go as in the footprint; else None.
        flat: copies in which all gradients are reduced after the backward pass.
    """

    weights: float
    optimizer: float
    buckets: float = 0
    gradients: float | None = None
    flat: float = 0


def trained_share(numbers: int, engine: EngineConfig, ranks: int) -> Trained:
    """What holds the trained parameters.

    Args: numbers: trained parameters.
    """
    whole = FLOAT * numbers
    if engine.kind == "torch":
        return Trained(whole, 2 * whole)
    part, bucket = whole / ranks, FLOAT * min(numbers, LARGEST_BUCKET)
    if engine.zero_stage == 0:
        return Trained(whole, 2 * whole, flat=bucket)
    if engine.zero_stage < 3:
        gradients = whole if engine.zero_stage == 1 else part
        return Trained(whole, 3 * part, bucket, gradients)
    gathered = FLOAT * min(numbers, _LIVE + _PREFETCHED)
    return Trained(part, 3 * part, bucket + gathered, part)


def checkpoint_bytes(numbers: int, engine: EngineConfig) -> int:
    """One checkpoint on disk, all ranks together: weights and two moments; from ZeRO 1 on the float32 copy too."""
    return FLOAT * numbers * (3 if engine.zero_stage == 0 else 4)


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
    there, free = free_disk(folder)
    if needed > free:
        raise UserError(
            "the disk has no room for the offloaded teachers, which are written there in float32",
            where=where,
            found=f"{free / 1e9:.1f} GB free in {there}",
            allowed=f"at least {needed / 1e9:.1f} GB",
            todo="make room, put `output` on another disk, or use backend: resident",
        )


def free_disk(folder: Path) -> tuple[Path, int]:
    """(the nearest folder above that exists, bytes free there)."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return there, shutil.disk_usage(there).free
