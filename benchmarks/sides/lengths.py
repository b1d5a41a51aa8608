"""Useful tokens per second on the real lengths of GSM8K and SST-2: benchmarks/packing.py, called from here."""

from __future__ import annotations

from pathlib import Path

from sides.setting import Result


def measure(quick: bool, folder: Path, threads: int) -> Result:
    """Per task and arm "task/arm/tokens_per_second" and "task/arm/useful_share" (of the positions of a batch)."""
    import packing

    shape = {"layers": 3, "width": 256, "heads": 4}
    steps, rounds = (2, 1) if quick else (10, 3)
    found = {task: packing.measure(task, steps, rounds, shape, packing.data_folder()) for task in packing.ARMS}
    return {f"{t}/{a}/{k}": v for t, arms in found.items() for a, values in arms.items() for k, v in values.items()}
