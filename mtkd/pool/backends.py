"""The built-in backends, and what a stage's teachers take together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mtkd.pool.backend import BACKENDS, Backend
from mtkd.pool.cached import Cached
from mtkd.pool.live import Resident
from mtkd.pool.offload import Offload, Streamed
from mtkd.pool.sharded import Sharded
from mtkd.pool.sizes import Place, Share, TeacherSize

BACKENDS.add("resident", Resident())
BACKENDS.add("offload", Offload())
BACKENDS.add("sharded", Sharded())
BACKENDS.add("streamed", Streamed())
BACKENDS.add("cached", Cached())


def teacher_share(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """What the weights of a stage's teachers take."""
    total = Share()
    for backend, sizes in _by_backend(teachers):
        total += backend.memory(sizes, place)
    return total


def check_room(teachers: Sequence[TeacherSize], place: Place, folder: Path, where: str) -> None:
    """Refuse a stage's teachers where there is no room for them; see `Backend.check_room`."""
    for backend, sizes in _by_backend(teachers):
        backend.check_room(sizes, place, folder, where)


def _by_backend(teachers: Sequence[TeacherSize]) -> Iterator[tuple[Backend, list[TeacherSize]]]:
    for name in dict.fromkeys(teacher.backend for teacher in teachers):
        yield BACKENDS[name], [teacher for teacher in teachers if teacher.backend == name]
