"""What teachers take of memory, in bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TeacherSize:
    """Bytes of a teacher's weights in memory, whichever type its files hold, and where they live.

    Attributes:
        weights: all of them (`mtkd.models.numbers`).
        head: those of the output head over the vocabulary, which are part of `weights`.
        ahead: sharded: numbers, not bytes, that are gathered before their layer runs.
        waits: sharded: where a rank's part is: "none" (on its device), "cpu" or "nvme".
    """

    weights: int
    head: int
    backend: str
    layers: int = 1
    ahead: int = 20_000_000
    waits: str = "none"

    @property
    def layer(self) -> int:
        """Bytes of one layer, all being equal; other tables of embeddings count among them."""
        return -(-(self.weights - self.head) // self.layers)


@dataclass(frozen=True)
class Place:
    """Where a stage runs.

    Attributes:
        ranks: in all.
        local: of them on one host.
        prefetch: `engine.prefetch`.
    """

    on_gpu: bool
    prefetch: bool = True
    ranks: int = 1
    local: int = 1


@dataclass(frozen=True)
class Share:
    """Bytes of the teachers' weights.

    Attributes:
        rank: on a rank's device while the teachers run. after: there while the student learns from what they said.
        host: in the host's memory per host, in addition to what ranks on a CPU hold there. disk: in files.
        built: in the host's memory of a rank while the stage is built. passing: there for a moment, one at a time.
    """

    rank: float = 0
    after: float = 0
    host: float = 0
    disk: float = 0
    built: float = 0
    passing: float = 0

    def __add__(self, other: Share) -> Share:
        return Share(
            self.rank + other.rank,
            self.after + other.after,
            self.host + other.host,
            self.disk + other.disk,
            self.built + other.built,
            max(self.passing, other.passing),
        )
