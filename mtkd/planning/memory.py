"""Count the memory of trained parameters and their optimizer, by stage of ZeRO, from parameter counts.

`mtkd.pool.backends` has the teachers' part; `mtkd.planning.footprint` counts what comes and goes within a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from mtkd.config import EngineConfig
from mtkd.engine.deepspeed_engine import LARGEST_BUCKET
from mtkd.models.numbers import FLOAT

_PREFETCHED, _LIVE = 50_000_000, 1_000_000_000
"""DeepSpeed's defaults at ZeRO 3: numbers gathered ahead, and numbers that may stay gathered."""


@dataclass(frozen=True)
class Trained:
    """Bytes on a rank for the trained parameters.

    Attributes:
        optimizer: moments, and from ZeRO 1 on the float32 copy that they belong to.
        buckets: DeepSpeed's buffers, and parameters that ZeRO 3 has gathered.
        gradients: where they stay between steps; None where the footprint counts them.
        flat: copies in which all gradients are reduced after the backward pass.
        gathered: the whole weights while the student writes, where a rank has a part of them otherwise.
    """

    weights: float
    optimizer: float
    buckets: float = 0
    gradients: float | None = None
    flat: float = 0
    gathered: float = 0


def trained_share(trained: float, engine: EngineConfig, ranks: int) -> Trained:
    """The bytes of a rank for the trained parameters.

    Args:
        trained: bytes of the trained parameters, which are float32, as their two moments are.
    """
    if engine.kind == "torch":
        return Trained(trained, 2 * trained)
    part, bucket = trained / ranks, min(trained, FLOAT * LARGEST_BUCKET)
    if engine.zero_stage == 0:
        return Trained(trained, 2 * trained, flat=bucket)  # without ZeRO every rank holds everything
    # From ZeRO 1 on DeepSpeed keeps a float32 copy with the moments, also of parameters that are float32 themselves.
    if engine.zero_stage < 3:
        gradients = trained if engine.zero_stage == 1 else part
        return Trained(trained, 3 * part, bucket, gradients)
    gathered = min(trained, FLOAT * (_LIVE + _PREFETCHED))
    return Trained(part, 3 * part, bucket + gathered, part, gathered=trained)


def checkpoint_bytes(trained: float, engine: EngineConfig) -> float:
    """One checkpoint on disk, all ranks together: weights and two moments; from ZeRO 1 on the float32 copy too.

    Args:
        trained: bytes of the trained parameters.
    """
    return trained * (3 if engine.zero_stage == 0 else 4)
