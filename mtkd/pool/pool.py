"""Several teachers behind one call, in the order the configuration names them."""

from __future__ import annotations

from collections.abc import Sequence

from mtkd.data.batch import Batch
from mtkd.errors import UserError
from mtkd.models.features import Features, split_key
from mtkd.pool.base import Teacher


class TeacherPool:
    """T teachers asked together.

    Args:
        teachers: in pool order.
        wants: per teacher the feature keys the objective reads.
        prefetch: tell the next teacher to start while the one before it runs.
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
        """Features of every teacher, in order, each of its own view of the batch; without gradients."""
        features = []
        for position in range(len(self.teachers)):
            if self._prefetch and position + 1 < len(self.teachers):
                after = self.teachers[position + 1]
                after.ahead(batch.read_by(after.view))
            features.append(self.ask(position, batch))
        return features

    def ask(self, position: int, batch: Batch) -> Features:
        """Features of one teacher, of its own view of the batch."""
        teacher = self.teachers[position]
        return teacher.forward(batch.read_by(teacher.view), self.wants[position])

    def close(self) -> None:
        """Free every teacher's memory."""
        for teacher in self.teachers:
            teacher.close()
