"""A frozen model cut into parts, one per rank, and the ZeRO-3 engine that puts its layers together when they run.

No rank ever has the whole model, nor a whole weight while it is loaded: the buffer that DeepSpeed partitions is
allocated and filled only where this rank's part is, so the pages of the other ranks' parts are never touched (on a GPU
the buffer is real: one weight at a time). `HfDeepSpeedConfig` is never created: no student and no other teacher can be
changed by it. benchmarks/sharded.py measures what loading takes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd.config import ShardedConfig
from mtkd.engine.dist import Dist, together
from mtkd.errors import DataError, UserError
from mtkd.models.broken import broken_weights
from mtkd.models.stored import StoredWeight

# Large parameters of one module that may be on their way from files; each takes the memory of the largest part.
_NVME_BUFFERS = 5
# Bytes from which on glibc gives a freed block back to the system; by itself it moves this up to 32 MB.
_BLOCK = 1 << 20
_M_MMAP_THRESHOLD = -3  # of mallopt


def engine_settings(config: ShardedConfig, name: str, largest_part: int) -> dict[str, Any]:
    """The DeepSpeed configuration of one teacher: ZeRO-3, nothing that trains.

    Args:
        name: of the teacher; its files are apart from those of other teachers and runs, which DeepSpeed would delete.
        largest_part: of one rank, numbers.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "overlap_comm": True,
        "stage3_prefetch_bucket_size": config.prefetch_parameters,
        "stage3_param_persistence_threshold": config.whole_parameters,
        # Every module that runs gathers another bucket ahead, so the bucket alone bounds nothing: without this limit,
        # which the running layer counts against too, one pass had the whole teacher gathered.
        "stage3_max_live_parameters": config.prefetch_parameters,
        # Nothing is kept for a later use in the same pass: a tied embedding would stay whole through all layers.
        "stage3_max_reuse_distance": 0,
        # True replaces torch's linear function, for the whole process and for good.
        "memory_efficient_linear": False,
    }
    if config.offload != "none":
        zero["offload_param"] = {"device": config.offload, "pin_memory": torch.cuda.is_available()}
    if config.offload == "nvme":
        assert config.nvme_path is not None
        zero["offload_param"] |= {
            "nvme_path": str(Path(config.nvme_path).absolute() / f"{name}-{os.getpid()}"),
            "buffer_size": largest_part,
            "buffer_count": _NVME_BUFFERS,
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # formal, and mandatory
        "gradient_accumulation_steps": 1,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},  # the weights' own types are kept; enabled, buffers would be cast too
        "zero_optimization": zero,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def check_nvme(config: ShardedConfig, where: str) -> None:
    """Refuse to keep weights in files where DeepSpeed cannot read them.

    Raises:
        UserError: its asynchronous reader cannot be built here.
    """
    if config.offload != "nvme":
        return
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "DeepSpeed cannot read weights from files here: libaio or its headers are missing",
            where=where,
            found="offload: nvme",
            allowed="none, cpu",
            todo="install libaio's development package on every node, or choose another offload",
        )


def partition(
    model: nn.Module,
    weights: Mapping[str, StoredWeight],
    settings: Mapping[str, Any],
    *,
    half: bool,
    device: torch.device,
    dist: Dist,
    where: str,
) -> None:
    """Give every parameter of a model on the meta device this rank's part of its stored values. A collective.

    Args:
        model: its buffers have values; those that are stored are read whole.
        weights: by the names of `model.state_dict()`; tied parameters under every name.
        settings: of `engine_settings`.
        half: matrices that are stored in bfloat16 stay so; everything else becomes float32.
        device: where the parts are put together.
        where: place in the configuration, for messages.
    Raises:
        DataError: on every rank, when a file cannot be read or a weight is not finite.
    """
    import deepspeed

    if device.type == "cpu":
        _give_blocks_back()
    init = deepspeed.zero.Init(config_dict_or_path=dict(settings))

    def fill() -> list[str]:
        return _fill(model, weights, init, half, device, dist)

    own = together(dist, fill, lambda reasons: DataError(f"the weights cannot be read: {reasons}", where=where))
    damaged = dist.broadcast_object(sorted({n for names in dist.gather_objects(own) or [] for n in names}))
    if damaged:
        raise broken_weights(where, ", ".join(damaged[:5]))


def _fill(
    model: nn.Module, weights: Mapping[str, StoredWeight], init: Any, half: bool, device: torch.device, dist: Dist
) -> list[str]:
    """Replace every parameter by this rank's part of it; the names of those with numbers that are not finite."""
    parts: dict[int, Any] = {}  # of tied parameters one
    broken: list[str] = []
    for place, module in model.named_modules():
        for short, old in module._parameters.items():
            if old is None:
                continue
            if id(old) not in parts:
                name = f"{place}.{short}" if place else short
                part = _parameter(weights[name], half, device, dist)
                if not _part(part, dist).isfinite().all():
                    broken.append(name)
                # What `Init` does to a parameter but the broadcast: every rank has its own values.
                init._convert_to_deepspeed_param(part)
                part.partition()  # type: ignore[attr-defined]
                parts[id(old)] = part
            module._parameters[short] = parts[id(old)]
    for name, buffer in model.named_buffers():
        if name in weights:
            buffer.copy_(read_numbers(weights[name], 0, buffer.numel()).view(buffer.shape))
    return broken


def _give_blocks_back() -> None:
    """Freed weights go back to the system at once, for the whole process, unless the environment says otherwise.

    Layers of all sizes come and go at every pass: kept for later use, they would hold as much again as the parts.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # glibc has it, musl does not
        library.mallopt(_M_MMAP_THRESHOLD, _BLOCK)


def _parameter(stored: StoredWeight, half: bool, device: torch.device, dist: Dist) -> nn.Parameter:
    """A frozen parameter of the whole shape with the values of this rank's part; the others are undefined."""
    keeps = half and stored.dtype == torch.bfloat16 and len(stored.shape) > 1
    values = torch.empty(stored.shape, dtype=torch.bfloat16 if keeps else torch.float32, device=device)
    parameter = nn.Parameter(values, requires_grad=False)
    mine = part_of(values.numel(), dist)
    _part(parameter, dist).copy_(read_numbers(stored, mine.start, mine.stop))
    return parameter


def _part(parameter: nn.Parameter, dist: Dist) -> Tensor:
    mine = part_of(parameter.numel(), dist)
    return parameter.data.view(-1)[mine.start : mine.stop]


def part_of(numbers: int, dist: Dist) -> range:
    """The flat positions of a parameter that ZeRO-3 keeps on this rank; the last rank's may be fewer, or none."""
    size = -(-numbers // dist.world_size)
    return range(min(size * dist.rank, numbers), min(size * (dist.rank + 1), numbers))


def largest_part(weights: Iterable[StoredWeight], world_size: int) -> int:
    """Numbers of the largest part that a rank keeps of one weight."""
    return max((-(-prod(weight.shape) // world_size) for weight in weights), default=0)


def read_numbers(stored: StoredWeight, start: int, stop: int) -> Tensor:
    """The values of a stored weight at the flat positions from `start` to `stop`, in the stored type.

    By plain reads: the pages of a mapping would count as this process's memory for as long as the kernel likes.
    """
    values = torch.empty(stop - start, dtype=stored.dtype)
    left: Any = values.view(torch.uint8).numpy()
    place = stored.start + start * stored.dtype.itemsize
    descriptor = os.open(stored.file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while len(left):
            count = os.preadv(descriptor, [left.data], place)
            if count == 0:
                raise OSError(f"{stored.file} ends within {stored.name}")
            left, place = left[count:], place + count
    finally:
        os.close(descriptor)
    return values
