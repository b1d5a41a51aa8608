"""The backends by the name that a configuration gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtkd.pool.backend import Backend
from mtkd.pool.cached import Cached
from mtkd.pool.live import Resident
from mtkd.pool.offload import Offload, Streamed
from mtkd.pool.sharded import Sharded
from mtkd.pool.sizes import Place, Share, TeacherSize

BACKENDS: Mapping[str, Backend] = {
    "resident": Resident(),
    "offload": Offload(),
    "sharded": Sharded(),
    "streamed": Streamed(),
    "cached": Cached(),
}


def teacher_share(teachers: Sequence[TeacherSize], place: Place) -> Share:
    """What the weights of a stage's teachers take."""
    total = Share()
    for name, backend in BACKENDS.items():
        of_it = [teacher for teacher in teachers if teacher.backend == name]
        total += backend.share(of_it, place) if of_it else Share()
    return total
