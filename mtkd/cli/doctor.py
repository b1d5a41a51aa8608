"""What machine and software this is: the facts a bug report should contain."""

from __future__ import annotations

import os
import platform
import shutil
from typing import Any

from mtkd.engine.folder import versions


def examine() -> dict[str, Any]:
    """Versions, devices, compiler, DeepSpeed and disk."""
    import torch

    from mtkd.engine.precision import here, slowdown

    here_is = "cuda" if torch.cuda.is_available() else "cpu"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    compiler = shutil.which("c++") or shutil.which("g++")
    extensions = os.environ.get("TORCH_EXTENSIONS_DIR") or os.path.join(
        os.path.expanduser("~"), ".cache", "torch_extensions"
    )
    return {
        "platform": platform.platform(),
        **versions(),
        "CPU cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "memory (GiB)": round(memory, 1),
        "GPUs": devices or "none",
        "engine.precision: auto": str(here(here_is)),
        "time of a product in bf16 / in fp32": f"{slowdown(here_is):.2f}, measured now",
        "C++ compiler": compiler or "none: DeepSpeed cannot build its communication op on CPU",
        "ninja": shutil.which("ninja") or "none on PATH: DeepSpeed cannot build ops",
        "DeepSpeed accelerator": os.environ.get("DS_ACCELERATOR", "chosen by DeepSpeed"),
        "stale build locks": _locks(extensions) or "none",
        "free disk here (GiB)": round(shutil.disk_usage(".").free / 2**30, 1),
    }


def _locks(folder: str) -> list[str]:
    """Lock files that an interrupted build left: the next build would wait for them for ever."""
    locks = []
    for root, _, files in os.walk(folder):
        locks += [os.path.join(root, name) for name in files if name == "lock"]
    return locks
