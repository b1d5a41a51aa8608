"""The memory planner against processes: what they have resident with offloaded teachers, and what DeepSpeed holds."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
from test_memory import GB, Case, batch, counts, llama

from mtkd.config.match import Match
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.planning.footprint import Storages

BIG = llama(512, 8)
CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt


def status(field: str) -> int:
    """A line of the kernel's about this process, bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def grown(backends: tuple[str, ...], folder: str) -> tuple[int, float]:
    """(bytes that a process grew by when steps of a stage are made in it, GB planned)."""
    # glibc would keep freed blocks below 32 MB for itself, now more of them and now fewer. Its variables are read when
    # a process starts, and this one is the fork of a server.
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallopt"):  # musl has none, and keeps less
        allocator.mallopt(_M_MMAP_THRESHOLD, 65_536)
        allocator.mallopt(_M_TRIM_THRESHOLD, 131_072)
    Case([Match(loss="kl")]).run(Path(folder))  # code and buffers that every step needs
    case = Case([Match(loss="kl")], backends, teacher=BIG)
    planned = case.planned().rank_gb
    before = status("VmRSS")
    objective, pool = case.make(Path(folder))
    engine = TorchEngine(objective, case.stage.optimizer, 3, CPU)
    for step in range(2):
        if step == 1:
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: building is not a step
        loss, _ = engine.forward(batch(), pool.forward(batch()), counts())
        engine.backward(loss)
        del loss
        engine.step(step)
    peak = status("VmHWM") - before
    pool.close()
    return peak, planned


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("offload",) * 3, ("resident", "offload", "offload")])
def test_a_process_grows_by_what_was_planned(backends: tuple[str, ...], tmp_path: Path) -> None:
    ((peak, planned),) = run_distributed(grown, 1, backends, str(tmp_path))
    # 0.99 to 1.09 were measured; what the libraries keep beside torch's blocks is not planned, and varies
    assert planned * GB == pytest.approx(peak, rel=0.25)


ZERO_STAGES = (0, 1, 3)


def held() -> list[tuple[int, int, float]]:
    """`held_under` of every ZeRO stage, one after the other."""
    found = []
    for zero_stage in ZERO_STAGES:
        found.append(held_under(zero_stage))
        gc.collect()
    return found


def held_under(zero_stage: int) -> tuple[int, int, float]:
    """(bytes of torch's storages between steps, most within one, GB planned) of one of two ranks under DeepSpeed."""
    from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed

    dist = init_distributed("cpu")
    case = Case([Match(loss="kl")], kind="deepspeed", processes=2, zero_stage=zero_stage)
    planned = case.planned().rank_gb
    with Storages() as storages:
        objective, pool = case.make(Path())
        engine = DeepSpeedEngine(
            objective, case.stage.optimizer, 3, CPU, zero_stage=zero_stage, accumulate=1, dist=dist
        )
        for step in range(3):
            storages.peak = storages.live
            loss, _ = engine.forward(batch(), pool.forward(batch()), counts())
            engine.backward(loss)
            del loss
            engine.step(step)
    return storages.live, storages.peak, planned


@pytest.mark.slow
def test_a_rank_holds_what_was_planned() -> None:
    for rank in run_distributed(held, 2, timeout=1200):
        for zero_stage, (_, peak, planned) in zip(ZERO_STAGES, rank, strict=True):
            assert planned * GB == pytest.approx(peak, rel=0.15), f"ZeRO {zero_stage}"
