"""A calibrated teacher: whatever its backend, its logits are divided by its own temperature before they are read."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.models.calibrated import Calibration, calibrated
from mtkd.models.features import Features
from mtkd.pool.base import Teacher
from mtkd.pool.cache.made_of import CALIBRATION


class CalibratedTeacher:
    """A teacher with calibrated logits; everything else of it is as it was.

    Args:
        teacher: as its backend opened it.
        calibration: fitted or given.
    """

    def __init__(self, teacher: Teacher, calibration: Calibration) -> None:
        self.name, self.info, self.view = teacher.name, teacher.info, teacher.view
        self.num_parameters, self.num_columns = teacher.num_parameters, teacher.num_columns
        self.calibration, self._teacher = calibration, teacher

    @property
    def embedding_table(self) -> Tensor | None:
        return self._teacher.embedding_table

    def provides(self) -> frozenset[str]:
        return self._teacher.provides()

    def ahead(self, batch: Batch) -> None:
        self._teacher.ahead(batch)

    def forward(self, batch: Batch, wants: frozenset[str]) -> Features:
        features = self._teacher.forward(batch, wants)
        if "logits" in features:
            features["logits"] = calibrated(features["logits"], self.calibration)
        return features

    def record(self) -> dict[str, Any]:
        """With the calibration: a cache of this teacher holds calibrated logits, and says so."""
        return {**self._teacher.record(), CALIBRATION: self.calibration.as_json()}

    def close(self) -> None:
        self._teacher.close()
