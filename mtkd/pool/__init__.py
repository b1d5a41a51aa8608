"""The teacher pool: several teachers behind one call, in the order the configuration names them."""

from __future__ import annotations

from collections.abc import Sequence

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.features import Features, split_key
from mtkd.pool.base import Teacher
from mtkd.pool.cached import CachedTeacher
from mtkd.pool.resident import ResidentTeacher

__all__ = ["CachedTeacher", "ResidentTeacher", "Teacher", "TeacherPool"]


class TeacherPool:
    """T teachers asked together.

    Args:
        teachers: in pool order.
        wants: per teacher the feature keys the objective reads.
    Raises:
        UserError: when a teacher's backend does not provide a wanted feature.
    """

    def __init__(self, teachers: Sequence[Teacher], wants: Sequence[frozenset[str]]) -> None:
        self.teachers, self.wants = list(teachers), list(wants)
        for teacher, keys in zip(self.teachers, self.wants, strict=True):
            missing = sorted({split_key(key)[0] for key in keys} - teacher.provides())
            if missing:
                raise UserError(
                    f"feature '{missing[0]}' cannot come from teacher '{teacher.name}'",
                    allowed=sorted(teacher.provides()),
                )

    def forward(self, batch: Batch) -> list[Features]:
        """Features of every teacher, in order; without gradients."""
        return [t.forward(batch, wants) for t, wants in zip(self.teachers, self.wants, strict=True)]

    def close(self) -> None:
        """Free every teacher's memory."""
        for teacher in self.teachers:
            teacher.close()
