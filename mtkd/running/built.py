"""A stage ready to train: models, data stream, engine. `mtkd.running.build` makes it, the loop reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mtkd.config import StageConfig
from mtkd.data.batch import Batch
from mtkd.data.load import LoadedData
from mtkd.data.sampler import TrainStream
from mtkd.data.transforms import Transform
from mtkd.engine.base import Engine, Trainable
from mtkd.planning.stages import check_checkpoint
from mtkd.pool import TeacherPool


@dataclass
class BuiltStage:
    """Everything the loop needs for one stage."""

    name: str
    stage: StageConfig
    objective: Trainable
    pool: TeacherPool
    engine: Engine
    stream: TrainStream
    data: LoadedData
    steps: int
    identity: dict[str, Any]
    layout: dict[str, Any]
    transforms: tuple[Transform, ...] = ()

    def num_parameters(self, member: str | None = None) -> int:
        """Parameters of the exported models, or of one of them; tied and shared ones once."""
        models = torch.nn.ModuleList(m.model for n, m in self.objective.models.items() if member in (None, n))
        return sum(getattr(p, "ds_numel", p.numel()) for p in models.parameters())

    def micro_batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step, which has this number, on the engine's device."""
        batches = next(self.stream)
        for transform in self.transforms:
            batches = transform(batches, step)
        return [batch.to(self.engine.device) for batch in batches]

    def close(self) -> None:
        """Free teachers, engine and graphs before the next stage."""
        self.pool.close()
        self.engine.close()

    def check_layout(self, manifest: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another identity, or one that was cut for other processes.

        Raises:
            DataError: with every difference.
        """
        check_checkpoint(self.name, manifest, self.identity, self.layout)
