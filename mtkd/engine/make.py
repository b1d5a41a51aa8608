"""The engine that a configuration names, and the processes and devices it runs on."""

from __future__ import annotations

import os

import torch

from mtkd.config import EngineConfig, StageConfig
from mtkd.engine.base import Engine, Trainable
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import UserError
from mtkd.models.attention import use_attention


def make_engine(
    config: EngineConfig, objective: Trainable, stage: StageConfig, steps: int, device: torch.device, dist: Dist
) -> Engine:
    """The engine the configuration names."""
    if config.kind == "torch":
        return TorchEngine(objective, stage.optimizer, steps, device)
    return DeepSpeedEngine(
        objective,
        stage.optimizer,
        steps,
        device,
        zero_stage=config.zero_stage,
        accumulate=stage.batch.accumulate,
        dist=dist,
    )


def start_processes(config: EngineConfig) -> tuple[Dist, torch.device]:
    """Join the process group if the engine has one, choose the device, set the CPU threads.

    `precision` may still be "auto" here: `mtkd.engine.precision.decided` refuses a kernel that does not go with it.
    """
    kind = config.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU was found", where="engine.device", found="cuda", todo="use device: auto or cpu")
    if kind == "cpu":  # transformers imports DeepSpeed when it saves a model, which would look for a GPU and warn
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if config.kind == "torch" and int(os.environ.get("WORLD_SIZE") or 1) > 1 and "RANK" in os.environ:
        raise UserError("a launcher started several processes, and this engine is one", where="engine.kind",
                        found="torch", todo="-o engine.kind=deepspeed")  # fmt: skip
    dist = init_distributed(kind, config.timeout_seconds) if config.kind == "deepspeed" else Dist()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    use_attention(config.attention, kind, config.precision)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size))
    threads = int(os.environ.get("OMP_NUM_THREADS") or 0)
    torch.set_num_threads(config.threads or threads or max(1, cores // local))
    device = torch.device(kind, dist.local_rank) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    return dist, device
