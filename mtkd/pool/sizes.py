"""What teachers take of memory, in numbers that every backend understands."""

from __future__ import annotations

from dataclasses import dataclass

FLOAT = 4
"""Bytes of a float32: the weights of student and teachers, whatever their file holds."""


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
