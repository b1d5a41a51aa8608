"""What an engine is: the optimizer step, its state on disk, and the student's whole weights."""

from __future__ import annotations

import math
import pickle
import random
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from mtkd.config import OptimizerConfig
from mtkd.data.batch import Batch
from mtkd.engine.dist import Dist
from mtkd.errors import DataError
from mtkd.models.features import Features
from mtkd.models.taps import TappedModel


class Trainable(nn.Module):
    """What an engine trains: a module whose forward returns (loss, metrics), with the models inside it.

    Attributes:
        tile, dtype: as the engine configuration has them, for validations.
    """

    tile: int
    dtype: torch.dtype

    @property
    def models(self) -> dict[str, TappedModel]:
        """The models that train, by name; they are exported."""
        raise NotImplementedError

    def outside_parameters(self) -> Iterable[nn.Parameter]:
        """Parameters that are read outside their own module's forward: ZeRO-3 must gather them for the objective."""
        heads = [model.output_head for model in self.models.values()]
        return [p for head in heads if head is not None for p in head if p is not None]

    def step_counts(self, batch: Batch) -> Mapping[str, int]:
        """More numbers of a micro-batch to sum over a step than `position_counts` has, always under the same names."""
        return {}

    def own_rates(self) -> dict[int, float]:
        """Peak learning rates other than the optimizer's, by the parameter's `id`."""
        return {}


def gradient_of(loss: Tensor) -> Tensor:
    """What a backward pass starts with: 1, and NaN for a loss that is not finite; nothing waits for the device.

    A loss may be NaN while its gradient is finite (a constant that was added to it). So its gradient is NaN as well:
    the gradient's norm, which every rank reads in every step, then tells of any row, micro-batch and rank.
    """
    return torch.where(loss.detach().isfinite(), 1.0, float("nan")).to(loss.dtype)


def all_finite(module: Trainable) -> bool:
    """Whether this rank's parameters are finite, and the objective's buffers are not NaN.

    One look at all of them, for a moment at which they are written to disk anyway.
    """
    inside = {id(buffer) for model in module.models.values() for buffer in model.buffers()}
    own = [buffer for buffer in module.buffers() if id(buffer) not in inside]
    # ZeRO-3 leaves empty tensors behind: this rank's part is in ds_tensor.
    parts = [getattr(p, "ds_tensor", p).detach() for p in module.parameters() if p.requires_grad]
    looks = [part.isfinite().all() for part in parts] + [~buffer.isnan().any() for buffer in own]
    return not looks or bool(torch.stack(looks).all())


class Engine(Protocol):
    """Runs an objective on one rank."""

    dist: Dist
    device: torch.device
    objective: Trainable

    def forward(
        self, batch: Batch, teachers: list[Features], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of a micro-batch (already divided by the step's global counts)."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add a micro-batch's gradient: NaN where the loss is not finite, see `gradient_of`."""
        ...

    def step(self, step: int) -> float:
        """Clip, update at the learning rate of `step`, clear gradients.

        Returns:
            The norm of the gradient over all ranks, before clipping: infinite or NaN where it is not finite, and never
            negative.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write this rank's part of the state (parameters, optimizer, random states) into `folder`."""
        ...

    def load(self, folder: Path) -> None:
        """Restore what `save` wrote, bitwise."""
        ...

    def model_state(self, name: str) -> dict[str, Tensor] | None:
        """The whole state dict of one of the objective's models on the main rank, None elsewhere. A collective."""
        ...

    def whole_head(self) -> AbstractContextManager[None]:
        """Within it the models' output heads are whole on every rank and may be read outside their modules."""
        ...

    def whole_student(self) -> AbstractContextManager[None]:
        """Within it the trained models are whole on every rank and run outside the engine, without gradients.

        Entering and leaving it are collectives, running is none: ranks may run a different number of forward passes.
        """
        ...

    def close(self) -> None:
        """Free memory and hooks."""
        ...


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of the optimizer step number `step` (from 0) of `steps`: a pure function, so nothing to resume.

    Rises linearly over the first ``warmup * steps`` steps to the peak, then stays, or falls to ``final_lr * peak``.
    """
    warmup = math.ceil(config.warmup * steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(steps - warmup, 1)
    if config.schedule == "constant":
        return config.lr
    falling = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.lr * (config.final_lr + (1 - config.final_lr) * falling)


def parameter_groups(module: Trainable, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices are decayed; biases, norms and other vectors are not.

    Parameters with a learning rate of their own are not decayed either; `lr_scale` is that rate in units of the
    optimizer's.
    """
    rates = module.own_rates()
    trainable = [p for p in module.parameters() if p.requires_grad and id(p) not in rates]
    # ZeRO-3 leaves empty tensors behind: the original shape is in ds_shape.
    matrices = [p for p in trainable if len(getattr(p, "ds_shape", p.shape)) > 1]
    ids = {id(p) for p in matrices}
    vectors = [p for p in trainable if id(p) not in ids]
    groups = [(matrices, config.weight_decay, 1.0), (vectors, 0.0, 1.0)]
    for rate in sorted(set(rates.values())):
        own = [p for p in module.parameters() if p.requires_grad and rates.get(id(p)) == rate]
        groups.append((own, 0.0, rate / config.lr))
    return [{"params": ps, "weight_decay": decay, "lr_scale": scale} for ps, decay, scale in groups if ps]


def set_learning_rate(groups: Iterable[dict[str, Any]], rate: float) -> None:
    """The step's learning rate to every group, times its own `lr_scale`."""
    for group in groups:
        group["lr"] = rate * group["lr_scale"]


def make_adamw(module: Trainable, config: OptimizerConfig, fused: bool = False) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`, with the learning rate set before every step by the engine.

    Args:
        fused: one pass over memory per step instead of a dozen.
    """
    groups = parameter_groups(module, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def seed_everything(seed: int) -> None:
    """Start every random state a training step may read at `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Every random state a training step may read, as tensors and plain values (no pickled classes)."""
    _, numbers, *rest = np.random.get_state(legacy=True)
    assert isinstance(numbers, np.ndarray)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": [*random.getstate()],
        "numpy": [torch.tensor(numbers.astype(np.int64)), *rest],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    version, inner, gauss = state["python"]
    random.setstate((version, tuple(inner), gauss))
    numbers, *rest = state["numpy"]
    np.random.set_state(("MT19937", numbers.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def load_plain(file: Path) -> dict[str, Any]:
    """What `torch.save` wrote, if it is tensors and plain values: nothing in the file is executed.

    Raises:
        DataError: when it is anything else.
    """
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            "the checkpoint holds more than tensors and plain values; it was not executed",
            where=str(file),
            found=(str(error).strip().splitlines() or [""])[0],
            todo="remove this checkpoint; mtkd did not write it",
        ) from None
    return state
