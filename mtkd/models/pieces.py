"""Work on many positions in equal pieces; a plan, which wants its memory and not its values, does three of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_planned: ContextVar[str] = ContextVar("mtkd_planned_tiles", default="")


@contextmanager
def planned_tiles(on_gpu: bool) -> Iterator[None]:
    """Within it losses run for the memory they take, not for their values.

    Of equal pieces of work the first two and the last are enough: the second meets what the first has left behind, and
    those after it meet no more. For a GPU (there may be none here) tiles are not cut into chunks.
    """
    token = _planned.set("gpu" if on_gpu else "cpu")
    try:
        yield
    finally:
        _planned.reset(token)


def planned_for_gpu() -> bool:
    """Whether the work is only planned, for a GPU."""
    return _planned.get() == "gpu"


def pieces(count: int, size: int) -> Iterator[slice]:
    """`count` positions in slices of `size`; one empty slice of none, since reading may be a collective."""
    starts = range(0, max(count, 1), size)
    for start in (*starts[:2], starts[-1]) if _planned.get() and len(starts) > 3 else starts:
        yield slice(start, min(start + size, count))
