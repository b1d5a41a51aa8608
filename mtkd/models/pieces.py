"""Work on many positions, cut into equal slices: tiles of positions, and on a CPU chunks of a tile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

# On a CPU the elementwise work of a tile goes in chunks of about this many logits (2 MB in float32): its dozen
# temporaries then stay in the cache, while the matrix products keep the size of the tile.
_CHUNK_LOGITS = 2**19


class Pieces:
    """How work is cut. The plan has a subclass that makes fewer of them: it wants the memory and not the values."""

    def of(self, count: int, size: int) -> Iterator[slice]:
        """`count` positions in slices of `size`; one empty slice of none, because reading may be a collective."""
        for start in self.starts(count, size):
            yield slice(start, min(start + size, count))

    def starts(self, count: int, size: int) -> Sequence[int]:
        """Where the slices of `of` begin."""
        return range(0, max(count, 1), size)

    def chunks(self, rows: int, logits: Tensor) -> Iterator[slice]:
        """Slices of a tile's rows for elementwise work on its logits [m,V]: small ones on a CPU, else all of them."""
        on_cpu = logits.device.type == "cpu"
        yield from self.of(rows, max(1, _CHUNK_LOGITS // max(logits.shape[-1], 1)) if on_cpu else rows)


EVERY_PIECE = Pieces()
"""The way of everybody but the plan."""
