"""What stays in memory of what trains, by stage of ZeRO, from parameter counts.

`mtkd.pool.backends` has the teachers' part; `mtkd.planning.footprint` counts what comes and goes within a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtkd.config import EngineConfig
from mtkd.engine.deepspeed_engine import LARGEST_BUCKET
from mtkd.pool.sizes import FLOAT

_PREFETCHED, _LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults at ZeRO 3: numbers gathered ahead, and numbers that may stay gathered."""


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
