"""What `engine.precision: auto` means here: bf16 where the processor or the GPU multiplies it fast, else fp32.

The choice follows from what the hardware says of itself, never from a measurement: two starts on one machine choose the
same. It is made once, before anything is planned, and a run keeps it: a stage made in another precision is another one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from mtkd.config import EngineConfig, RunConfig
from mtkd.config.yamlfile import parse, read_text
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.seal import newest_sealed
from mtkd.errors import DataError, UserError

Precision = Literal["fp32", "bf16"]

# What oneDNN is limited to by the variable of this name; https://uxlfoundation.github.io/oneDNN, "CPU Dispatcher
# Control". It knows a name in any case, and passes over one that it does not know.
_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_WITHOUT_BF16 = ("sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni")
_WITHOUT_TILES = (*_WITHOUT_BF16, "avx512_core_bf16", "avx512_core_fp16", "avx10_1_512", "avx10_2_512")

# Rows, columns and depth of the product that is measured: some 5 ms on a slow processor, and a GPU that is busy.
_MEASURED = {"cpu": 256, "cuda": 2048}
_REPEATS = 5


@dataclass(frozen=True)
class Choice:
    """A precision, and why it is this one."""

    precision: Precision
    why: str

    def __str__(self) -> str:
        return f"{self.precision} ({self.why})"


def with_precision(config: RunConfig, *, planned: bool = False) -> RunConfig:
    """The run with "auto" replaced by what it means for this run on this machine; see `choose`.

    Raises:
        UserError: the attention kernel that was asked for has no such precision.
    """
    if config.engine.precision != "auto":
        return config
    return decided(config, choose(config, planned=planned).precision)


def decided(config: RunConfig, precision: Precision) -> RunConfig:
    """The run in this precision."""
    engine = config.engine
    if precision == "fp32" and engine.attention == "flash" and device_of(engine) == "cuda":
        raise UserError(
            "flash attention has no kernel for fp32 on a GPU, and this one does not multiply bf16",
            where="engine.attention",
            found=engine.attention,
            allowed=["auto", "efficient", "math"],
        )
    return config.model_copy(update={"engine": engine.model_copy(update={"precision": precision})})


def choose(config: RunConfig, *, planned: bool = False) -> Choice:
    """The precision of a run: what its file says, what it was begun in, or what is fast here; in this order.

    Args:
        planned: only the plan is asked for; where `engine.gpu_memory_gb` describes a GPU, it is that one's.
    """
    engine = config.engine
    if engine.precision != "auto":
        return Choice(engine.precision, "as the configuration says")
    begun = begun_in(config.folder)
    if begun is not None:
        return Choice(begun, f"auto: as this run was begun, see {RunDir(config.folder).config_file}")
    if planned and engine.device == "auto" and engine.gpu_memory_gb is not None and device_of(engine) == "cpu":
        return Choice("bf16", "auto: for a GPU of engine.gpu_memory_gb; asked again where the run starts")
    choice = here(device_of(engine))
    return Choice(choice.precision, f"auto: {choice.why}")


def begun_in(folder: Path) -> Precision | None:
    """The precision of the run in this folder; None where there is none, or nothing that names it.

    The run writes a damaged run.yaml again; until then its stages name it.
    """
    run = RunDir(folder)
    if not run.config_file.exists():
        return None
    try:
        if not run.config_is_whole():
            return _of_stages(run)
        values = parse(read_text(run.config_file), str(run.config_file)).plain()
    except UserError:
        return _of_stages(run)
    engine = (values.get("engine") if isinstance(values, dict) else None) or {}
    # Before there was "auto", the default was fp32 and was not written.
    precision = engine.get("precision", "fp32") if isinstance(engine, dict) else None
    return precision if precision in ("fp32", "bf16") else None


def _of_stages(run: RunDir) -> Precision | None:
    """What the records of finished stages and of checkpoints say; those that are damaged say nothing."""
    for stage in (StageDir(path) for paths in run.stage_folders().values() for path in paths):
        identities = [newest_sealed(stage.checkpoints).manifest.get("identity")]
        with suppress(DataError):
            identities.append(record.identity if (record := stage.done()) else None)
        for identity in identities:
            precision = identity.get("precision") if isinstance(identity, dict) else None
            if precision in ("fp32", "bf16"):
                return precision
    return None


def device_of(engine: EngineConfig) -> str:
    """ "cpu" or "cuda": where the run computes."""
    import torch

    if engine.device != "auto":
        return engine.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def here(device: str) -> Choice:
    """What this machine's "cpu" or "cuda" device multiplies fast."""
    import torch

    if device == "cpu":
        return of_processor(
            _capabilities(),
            level=torch.backends.cpu.get_cpu_capability(),
            onednn=torch.backends.mkldnn.is_available(),
            environment=os.environ,
        )
    if not torch.cuda.is_available():
        return Choice("bf16", "for a GPU; there is none here, asked again where the run starts")
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Choice("bf16", f"{name} multiplies bf16")
    return Choice("fp32", f"{name} does not multiply bf16")


def of_processor(facts: Mapping[str, Any], *, level: str, onednn: bool, environment: Mapping[str, str]) -> Choice:
    """What a processor multiplies fast, as torch will use it.

    Args:
        facts: `torch.cpu.get_capabilities()`. level: `torch.backends.cpu.get_cpu_capability()`.
        onednn: whether torch has it; nothing else multiplies bf16 in hardware.
        environment: variables that hide a part of the processor.
    """
    tiles, vectors = bool(facts.get("amx_bf16")), bool(facts.get("avx512_bf16"))
    if not (tiles or vectors or facts.get("bf16")):
        return Choice("fp32", "this processor does not multiply bf16")
    if not onednn:
        return Choice("fp32", "this torch has no oneDNN, which multiplies bf16")
    if facts.get("bf16"):
        return Choice("bf16", "this processor multiplies bf16 (BF16 of ARM)")
    variable = next((name for name in _LIMITS if environment.get(name)), "")
    limit = environment.get(variable, "").lower()
    if limit in _WITHOUT_BF16:
        return Choice("fp32", f"{variable}={environment[variable]} hides what multiplies bf16 here")
    if not level.startswith("AVX512"):
        return Choice("fp32", f"torch is limited to {level} (ATEN_CPU_CAPABILITY)")
    if tiles and limit not in _WITHOUT_TILES:
        return Choice("bf16", "this processor multiplies bf16 in tiles (AMX)")
    if vectors and not str(facts.get("cpu_name", "")).startswith("Intel"):
        return Choice("bf16", "this processor multiplies bf16 (AVX-512 BF16)")
    # Half as many such instructions per cycle as products of float32: measured from 0.5 to 1 times their speed.
    return Choice("fp32", "without AMX this processor multiplies bf16 no faster than float32")


def warning(engine: EngineConfig) -> str:
    """A line about bf16 where it is slow, with a measured factor; empty where there is nothing to say."""
    if engine.precision != "bf16":
        return ""
    device = device_of(engine)
    choice = here(device)
    if choice.precision == "bf16":
        return ""
    return (
        f"engine.precision: bf16 is slow here: a product takes {slowdown(device):.1f} times as long as in fp32 "
        f"(measured); {choice.why}. A new run with precision: auto would take fp32"
    )


@cache
def slowdown(device: str) -> float:
    """Time of a product in bf16 over that in float32 on this machine, the best of a few; some 20 ms."""
    import torch

    size = _MEASURED[device]
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.ones(size, size, dtype=dtype, device=device)
        seconds = []
        for _ in range(_REPEATS + 1):  # the first makes its kernel
            begun = time.perf_counter()
            torch.nn.functional.linear(left, left)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
        best[dtype] = min(seconds[1:])
    return best[torch.bfloat16] / best[torch.float32]


def _capabilities() -> dict[str, Any]:
    """What the processor can do, without AMX where the system does not let a process use it."""
    import torch

    facts = dict(torch.cpu.get_capabilities())
    if facts.get("amx_bf16") and not torch.cpu._init_amx():
        facts["amx_bf16"] = False
    return facts
