"""The sharded backend: every rank keeps a part of the teacher, and layers are put together while they run.

Each teacher has a DeepSpeed engine of its own (ZeRO-3, no optimizer), independent of the student's ZeRO stage and of
the other teachers. Its forward is a collective of all ranks: they must run the same teachers in the same order, and the
pool does: every teacher runs on every micro-batch, with any weights and whether or not a row of it counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtkd.config import ShardedConfig, TeacherConfig
from mtkd.config.teacher import ShardedTeacher
from mtkd.data.batch import Batch
from mtkd.engine.dist import Dist
from mtkd.models.features import Features
from mtkd.models.forward import number_format
from mtkd.models.numbers import FLOAT
from mtkd.models.taps import LOW_TOLERANCE, VERIFY_TOLERANCE, TappedModel
from mtkd.models.weights import find_weights
from mtkd.pool.backend import Stock
from mtkd.pool.base import ElsewhereModel, LiveModel, move_buffers
from mtkd.pool.live import ModelBackend
from mtkd.pool.partition import check_nvme, engine_settings, largest_part, partition
from mtkd.pool.sizes import Place, Share, TeacherSize


class ShardedModel(ElsewhereModel):
    """A frozen `TappedModel` under its own ZeRO-3 engine.

    Logits it gives hold the whole output head, gathered once by the forward pass; its memory is free when no one holds
    them any more, normally after the micro-batch.

    Args:
        model: with partitioned parameters.
        settings: of the engine.
        low: device type, where its matrices are bfloat16 and it runs under autocast; else None.
    """

    def __init__(self, model: TappedModel, settings: Mapping[str, Any], low: str | None) -> None:
        super().__init__(model)
        import deepspeed

        self._low = low
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                # Stored in bfloat16 or not, the residual stream is what a resident teacher's is: float32.
                module.register_forward_hook(_in_float32)
        engine, _, _, _ = deepspeed.initialize(model=model, config=dict(settings), dist_init_required=False)
        self._engine = [engine]  # in a list: it is a module itself, around the same model
        self._files: str | None = settings["zero_optimization"].get("offload_param", {}).get("nvme_path")

    def verify(self) -> None:
        """See `TappedModel.verify`. A collective."""
        with self._out_of_turn():
            self.model.verify(torch.bfloat16 if self._low else torch.float32)

    def enable_packing(self, where: str) -> None:
        # A collective.
        low = number_format(self._low or "cpu", torch.bfloat16 if self._low else torch.float32)
        with self._out_of_turn(), low:
            self.model.enable_packing(where, LOW_TOLERANCE if self._low else VERIFY_TOLERANCE)

    @property
    def embedding_table(self) -> Tensor:
        """A whole copy on every rank, [V,H] float32. A collective."""
        import deepspeed

        table = self.model.model.get_input_embeddings().weight
        with deepspeed.zero.GatheredParameters([table]):
            return self.model.embedding_table.detach().float().clone()

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        """The wanted features. A collective."""
        # The engine's own forward would switch autocast off.
        features: Features = self.model(batch, wants)
        return features

    @contextmanager
    def _out_of_turn(self) -> Iterator[None]:
        """Within it the model may run otherwise than a forward pass does. The order of layers is learned again."""
        try:
            yield
        finally:
            coordinator = self._engine[0].optimizer.get_param_coordinator()
            if not coordinator.is_invalid_trace():
                coordinator._invalidate_trace()

    def close(self) -> None:
        """Remove the hooks and free this rank's part; the model must not run any more."""
        from deepspeed.runtime.zero import parameter_offload

        for engine in self._engine:
            engine.destroy()
            # A global list of every root module, for modules that ask who called them.
            stack = parameter_offload.FWD_MODULE_STACK
            stack[:] = [module for module in stack if module is not self.model]
        self._engine = []
        for parameter in self.model.parameters():
            parameter.data, parameter.ds_tensor = torch.empty(0), None  # type: ignore[attr-defined]
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)


def shard(
    model: TappedModel,
    folder: Path,
    teacher: TeacherConfig,
    device: torch.device,
    dtype: torch.dtype,
    dist: Dist,
    where: str,
) -> ShardedModel:
    """A model without weights with those of its folder, a part on every rank; checked as a resident one. A collective.

    Args:
        model: its parameters on the meta device. folder: checked.
        dtype: the run's: in bfloat16, where all matrices are stored in it, they stay so; else everything is float32.
        where: place of the teacher in the configuration.
    Raises:
        DataError: weights that are not the model's, cannot be read, or are not finite.
    """
    weights, config = find_weights(model.model, folder), _engine(teacher)
    half = dtype == torch.bfloat16 and all(w.dtype == dtype for w in weights.values() if len(w.shape) > 1)
    half = half and config.offload != "nvme"  # DeepSpeed's files have one type for all
    settings = engine_settings(config, teacher.name, largest_part(weights.values(), dist.world_size))
    move_buffers(model, device)
    partition(model.model, weights, settings, half=half, device=device, dist=dist, where=where)
    sharded = ShardedModel(model, settings, device.type if half else None)
    sharded.verify()
    return sharded


def _engine(teacher: TeacherConfig) -> ShardedConfig:
    assert isinstance(teacher, ShardedTeacher)
    return teacher.sharded or ShardedConfig()


class Sharded(ModelBackend):
    """Every rank keeps a part of the weights."""

    in_files = shown = several = True
    formats = False

    def memory(self, teachers: Sequence[TeacherSize], place: Place) -> Share:
        """A part of each on every rank; the layer that runs and what is gathered ahead of it; each head once, whole."""
        away = ("cpu", "nvme") if place.on_gpu else ("nvme",)  # a CPU's memory is the host's
        parts = sum(t.weights for t in teachers if t.waits not in away) / place.ranks
        pinned = sum(t.weights for t in teachers if t.waits == "cpu") if place.on_gpu else 0
        files = sum(t.weights for t in teachers if t.waits == "nvme")
        gathered = max(min(t.layer + FLOAT * t.ahead, t.weights) for t in teachers)
        after = parts + sum(t.head for t in teachers)
        here = place.local / place.ranks  # of all parts, on one host
        return Share(after + gathered, after, pinned * here, files * here)

    def check(self, teacher: TeacherConfig, where: str) -> None:
        check_nvme(_engine(teacher), f"{where}.sharded")

    def size(self, teacher: TeacherConfig, weights: int, head: int, layers: int) -> TeacherSize:
        engine = _engine(teacher)
        return TeacherSize(weights, head, teacher.backend, layers, 2 * engine.prefetch_parameters, engine.offload)

    def place(self, model: TappedModel, teacher: TeacherConfig, stock: Stock) -> LiveModel:
        site = stock.site
        return shard(model, stock.folder(), teacher, site.device, site.dtype, site.dist, site.where)


def _in_float32(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return output.float()
