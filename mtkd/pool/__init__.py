"""The teacher pool: several teachers behind one call, in the order the configuration names them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models.features import Features, split_key
from mtkd.models.taps import TappedModel
from mtkd.pool.base import Teacher
from mtkd.pool.cached import CachedTeacher
from mtkd.pool.offload import OffloadedModel, OffloadTeacher, offload, stream
from mtkd.pool.resident import ResidentTeacher
from mtkd.pool.sharded import ShardedModel, ShardedTeacher, shard

__all__ = [
    "CachedTeacher",
    "LiveModel",
    "OffloadTeacher",
    "OffloadedModel",
    "ResidentTeacher",
    "ShardedModel",
    "ShardedTeacher",
    "Teacher",
    "TeacherPool",
    "offload",
    "pooled",
    "shard",
    "stream",
]

LiveModel = TappedModel | OffloadedModel | ShardedModel
"""A model that can be run, wherever its weights are."""


def pooled(name: str, model: LiveModel, device: torch.device, dtype: torch.dtype, compiled: bool = False) -> Teacher:
    """A live model as a teacher of the pool; see `ResidentTeacher` for the arguments.

    Args: compiled: a resident one goes through torch.compile.
    """
    if isinstance(model, ShardedModel):
        return ShardedTeacher(name, model, device, dtype)
    if isinstance(model, OffloadedModel):
        return OffloadTeacher(name, model, device, dtype)
    if compiled:
        model.compile_model()
    return ResidentTeacher(name, model, device, dtype)


class TeacherPool:
    """T teachers asked together.

    Args:
        teachers: in pool order.
        wants: per teacher the feature keys the objective reads.
        prefetch: offloaded teachers: bring the next one's weights while the one before it runs.
    Raises:
        UserError: when a teacher's backend does not provide a wanted feature.
    """

    def __init__(self, teachers: Sequence[Teacher], wants: Sequence[frozenset[str]], prefetch: bool = True) -> None:
        self.teachers, self.wants, self._prefetch = list(teachers), list(wants), prefetch
        for teacher, keys in zip(self.teachers, self.wants, strict=True):
            missing = sorted({split_key(key)[0] for key in keys} - teacher.provides())
            if missing:
                raise UserError(
                    f"feature '{missing[0]}' cannot come from teacher '{teacher.name}'",
                    allowed=sorted(teacher.provides()),
                )

    def forward(self, batch: Batch) -> list[Features]:
        """Features of every teacher, in order; without gradients."""
        features = []
        for position, (teacher, wants) in enumerate(zip(self.teachers, self.wants, strict=True)):
            following = self.teachers[position + 1] if position + 1 < len(self.teachers) else None
            if self._prefetch and isinstance(following, OffloadTeacher):
                following.prefetch()
            features.append(teacher.forward(batch, wants))
        return features

    def close(self) -> None:
        """Free every teacher's memory."""
        for teacher in self.teachers:
            teacher.close()
