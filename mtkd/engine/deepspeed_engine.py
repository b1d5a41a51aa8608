"""The DeepSpeed engine: several processes, ZeRO 0 to 3. Every default that changes numbers is written out."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtkd.config import OptimizerConfig
from mtkd.data.batch import Batch
from mtkd.engine.base import (
    Trainable,
    gradient_of,
    learning_rate,
    load_plain,
    make_adamw,
    random_state,
    set_learning_rate,
    set_random_state,
)
from mtkd.engine.dist import Dist
from mtkd.engine.shared_memory import drop_name, sweep
from mtkd.errors import DataError
from mtkd.models.features import Features

LARGEST_BUCKET = 500_000_000
"""Numbers in DeepSpeed's buffer for reducing gradients: its default."""

_TAG = "deepspeed"
_AFTER_WATCH = 60.0  # seconds


def init_distributed(device: str, timeout: float = 1800.0) -> Dist:
    """Join the process group (gloo on CPU, NCCL on GPUs) that the launcher described in the environment.

    A single process without a launcher gets a group of one.

    Args:
        timeout: seconds that a collective may take; see `EngineConfig.timeout_seconds`.
    """
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not torch.distributed.is_initialized():
        defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        alone = "RANK" not in os.environ
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
        if alone:
            os.environ["MASTER_PORT"] = "0"
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
            torch.distributed.init_process_group(
                "gloo" if device == "cpu" else "nccl", store=store, rank=0, world_size=1
            )
        # A little later than `mtkd.engine.watch`, which says more: torch's own time-out is for what it overlooks.
        limit = timedelta(seconds=timeout + _AFTER_WATCH)
        if device == "cpu":
            sweep()
        deepspeed.init_distributed(
            "gloo" if device == "cpu" else "nccl", auto_mpi_discovery=False, verbose=False, timeout=limit
        )
        if device == "cpu":
            Dist.current().barrier()  # every rank has mapped the buffers of all
            drop_name(Dist.current().rank)
    return Dist.current()


def deepspeed_config(
    config: OptimizerConfig, *, zero_stage: int, accumulate: int, world_size: int, numbers: int = LARGEST_BUCKET
) -> dict[str, Any]:
    """The whole DeepSpeed configuration; what is not here was checked to have no influence on the numbers.

    Micro-batch sizes are formal (mtkd cuts the batches): one per process, so that DeepSpeed's product rule holds.

    Args:
        numbers: trained parameters.
    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulate,
        "train_batch_size": accumulate * world_size,
        # at stage 0 DeepSpeed clips without telling the norm; `DeepSpeedEngine.step` clips there
        "gradient_clipping": config.clip if zero_stage else 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_scatter": zero_stage > 1,
            # DeepSpeed allocates the whole bucket; one larger than all gradients together would never fill
            "reduce_bucket_size": max(min(numbers, LARGEST_BUCKET), 1),
            # every parameter is sharded, small ones too: otherwise small models never test sharding
            "stage3_param_persistence_threshold": 0 if zero_stage == 3 else 100_000,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


@contextmanager
def _disk_errors_at_the_end(engine: Any) -> Iterator[None]:
    """Within it what this rank cannot write raises only when DeepSpeed's save is through.

    A save has barriers in its middle: a rank that left before one would leave the others waiting there, or meet their
    barrier with a collective of its own.
    """
    errors: list[Exception] = []

    def guarded(function: Callable[..., None]) -> Callable[..., None]:
        def call(*args: object, **options: object) -> None:
            try:
                function(*args, **options)
            except Exception as error:
                errors.append(error)

        return call

    files = engine.checkpoint_engine
    files.save, files.makedirs = guarded(files.save), guarded(files.makedirs)
    engine._copy_recovery_script = lambda folder: None  # scripts have no place in a checkpoint, and could fail too
    try:
        yield
    finally:
        del files.save, files.makedirs, engine._copy_recovery_script
    if errors:
        raise errors[0]


@contextmanager
def _without_hooks(models: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Within it no hook of these modules runs: ZeRO-3's would free each parameter after its layer's forward."""
    modules = [module for model in models for module in model.modules()]
    kept = [(module._forward_pre_hooks, module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_pre_hooks, module._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for module, (before, after) in zip(modules, kept, strict=True):
            module._forward_pre_hooks, module._forward_hooks = before, after


class DeepSpeedEngine:
    """One objective under `deepspeed.initialize`; the same arguments as `TorchEngine`, plus how to shard."""

    def __init__(
        self,
        objective: Trainable,
        config: OptimizerConfig,
        steps: int,
        device: torch.device,
        *,
        zero_stage: int,
        accumulate: int,
        dist: Dist,
    ) -> None:
        import deepspeed

        self.dist, self.device = dist, device
        self._config, self._steps, self._accumulate = config, steps, accumulate
        self.objective = objective.to(device)
        self._register_outside(zero_stage)
        settings = deepspeed_config(
            config,
            zero_stage=zero_stage,
            accumulate=accumulate,
            world_size=dist.world_size,
            numbers=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        )
        self._zero_stage = zero_stage
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=objective, optimizer=make_adamw(objective, config), config=settings, dist_init_required=False
        )

    def _register_outside(self, zero_stage: int) -> None:
        """The tiled loss reads the output head outside its module, a penalty the weighting's parameters."""
        if zero_stage == 3:
            from deepspeed.runtime.zero import register_external_parameter

            for parameter in self.objective.outside_parameters():
                register_external_parameter(self.objective, parameter)

    def _heads(self) -> list[torch.nn.Parameter]:
        """Weights and biases of the models' token-level output heads."""
        heads = [model.output_head for model in self.objective.models.values()]
        return [p for head in heads if head is not None for p in head if p is not None]

    def forward(
        self, batch: Batch, teachers: list[Features], counts: dict[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return self.engine(batch, teachers, counts)

    def backward(self, loss: Tensor) -> None:
        # The one place that undoes DeepSpeed's own averaging: it divides by the accumulation steps and by the number of
        # ranks, while our losses are already divided by the global counts.
        self.engine.backward(loss * (self._accumulate * self.dist.world_size * gradient_of(loss)))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; the update happens in `step`

    def step(self, step: int) -> float:
        set_learning_rate(self.optimizer.param_groups, learning_rate(self._config, step, self._steps))
        norm = self._clip() if self._zero_stage == 0 else None
        self.engine.step()
        value = float(self.engine.get_global_grad_norm() if norm is None else norm)
        return value if value >= 0 else float("nan")  # under ZeRO DeepSpeed says -1 for NaN and infinity

    def _clip(self) -> Tensor:
        """Clip at stage 0, where every rank holds the whole, already reduced gradient; its norm before clipping."""
        trainable = [p for p in self.objective.parameters() if p.requires_grad]
        return torch.nn.utils.clip_grad_norm_(trainable, self._config.clip or float("inf"))

    def save(self, folder: Path) -> None:
        with _disk_errors_at_the_end(self.engine):
            # save_latest=False: DeepSpeed writes `latest` before its closing barrier and without fsync.
            self.engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)
        torch.save(random_state(), folder / f"random-rank-{self.dist.rank}.pt")

    def load(self, folder: Path) -> None:
        path, _ = self.engine.load_checkpoint(str(folder), tag=_TAG)
        if path is None:
            raise DataError("DeepSpeed found no checkpoint", where=str(folder))
        own = folder / f"random-rank-{self.dist.rank}.pt"
        if own.exists():  # else more processes go on than saved: a new one draws from its own seed
            set_random_state(load_plain(own))

    def model_state(self, name: str) -> dict[str, Tensor] | None:
        model = self.objective.models[name].model
        if self._zero_stage < 3:
            state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
            return state if self.dist.is_main else None
        import deepspeed

        whole: dict[str, Tensor] = {}
        # One parameter at a time: the whole model exists on the main rank only, and only in CPU memory.
        for name, parameter in model.named_parameters(remove_duplicate=False):
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.dist.is_main:
                    whole[name] = parameter.detach().cpu().clone()
        if not self.dist.is_main:
            return None
        persistent = model.state_dict().keys()
        buffers = {name: value.detach().cpu() for name, value in model.named_buffers() if name in persistent}
        return {**whole, **buffers}

    def whole_head(self) -> AbstractContextManager[None]:
        heads = self._heads()
        if self._zero_stage < 3 or not heads:
            return nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(heads)

    def whole_student(self) -> AbstractContextManager[None]:
        return nullcontext() if self._zero_stage < 3 else self._gathered()

    @contextmanager
    def _gathered(self) -> Iterator[None]:
        import deepspeed

        models = list(self.objective.models.values())
        with deepspeed.zero.GatheredParameters([p for model in models for p in model.parameters()]):
            with _without_hooks(models):
                yield

    def close(self) -> None:
        self.engine.destroy()
