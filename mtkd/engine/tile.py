"""How many positions' vocabulary-size logits exist at one time."""

from __future__ import annotations

from mtkd.config import EngineConfig

# Per device: bytes of one model's float32 logits in a tile, and the largest tile in positions. Measured, not derived:
# the CPU's were the fastest on two machines, the GPU's are a guess until a GPU is measured.
_LIMITS = {"cpu": (32 * 2**20, 256), "cuda": (256 * 2**20, 4096)}


def tile_for(engine: EngineConfig, columns: int, device: str) -> int:
    """Positions per tile for logits of that many columns on a "cpu" or "cuda" device.

    On a CPU larger blocks come from the system page by page and cost more than the arithmetic on them; a GPU needs
    larger ones to be busy. A multiple of 16, the height of a matrix unit, and at least 16: below, the head is read
    from memory more often than it is worth.
    """
    if engine.tile != "auto":
        return engine.tile
    logit_bytes, most = _LIMITS[device]
    return min(max(logit_bytes // (4 * max(columns, 1)) // 16 * 16, 16), most)
