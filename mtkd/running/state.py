"""Keep the state of the training loop, part of every checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainState:
    """The state of the loop itself; the engine has parameters, optimizer and random states.

    Attributes:
        step: optimizer steps done.
        stream: position in the data, two integers.
        seconds: spent training over all sessions.
        targets: positions with a target seen so far.
        meters: per rank the metrics of the steps since the last log line; without them the first line after a resume
            would be the mean of fewer steps.
        best_step: step of the best validation score so far, 0 before the first.
        best_value: that score.
        waited: evaluations since then.
        ended: why training ends before the last step; empty while it goes on.
    """

    step: int = 0
    stream: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    targets: int = 0
    meters: list[dict[str, Any]] = field(default_factory=list)
    best_step: int = 0
    best_value: float | None = None
    waited: int = 0
    ended: str = ""


def regrouped(meters: list[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """`TrainState.meters` for another number of processes: the first one has the sums of all."""
    if not meters or len(meters) == ranks:
        return meters
    sums = {name: sum(meter["sums"].get(name, 0.0) for meter in meters) for name in meters[0]["sums"]}
    seen = meters[0]["seen"]
    others = [{"sums": dict.fromkeys(sums, 0.0), "seen": seen} for _ in range(ranks - 1)]
    return [{"sums": sums, "seen": seen}, *others]
