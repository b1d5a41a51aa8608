"""Calibrated logits: a teacher's logits divided by a temperature of its own, and a bias per class where it has one.

The temperature of a row (`losses`) softens teacher and student alike. This one belongs to the teacher: it corrects how
sure it is, before weights, rows, caches and ensembles read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mtkd.data.device import moved
from mtkd.errors import UserError
from mtkd.models.features import DenseLogits, Logits, SparseLogits, SparseRows, as_logits


@dataclass(frozen=True)
class Calibration:
    """``logits / temperature + bias``.

    Attributes:
        temperature: above 1 makes a teacher less sure, below 1 surer.
        bias: nats per class, [C]; () for none.

    Source: Guo, Pleiss, Sun, Weinberger 2017, On Calibration of Modern Neural Networks, arXiv 1706.04599, section 4.2;
    the bias is that of vector scaling with equal scales.
    """

    temperature: float
    bias: tuple[float, ...] = ()

    @property
    def changes_nothing(self) -> bool:
        """Whether logits stay what they are, bit by bit."""
        return self.temperature == 1 and not any(self.bias)

    def as_json(self) -> dict[str, Any]:
        """Plain values, for records."""
        return {**asdict(self), "bias": list(self.bias)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Calibration:
        """What `as_json` gave."""
        return cls(float(values["temperature"]), tuple(map(float, values["bias"])))


@dataclass
class CalibratedLogits:
    """Logits of any kind, calibrated when they are read.

    Attributes:
        inner: as the teacher gives them.
        bias: [columns] float32, or None.
    """

    inner: Logits
    temperature: float
    bias: Tensor | None = None

    @property
    def num_columns(self) -> int:
        return self.inner.num_columns

    def rows(self, index: Tensor) -> Tensor:
        values = self.inner.rows(index) / self.temperature
        return values if self.bias is None else values + moved(self.bias, values.device)

    def select(self, columns: Tensor) -> CalibratedLogits:
        bias = None if self.bias is None else moved(self.bias, columns.device).index_select(0, columns)
        return replace(self, inner=self.inner.select(columns), bias=bias)

    def in_dtype(self, dtype: torch.dtype) -> CalibratedLogits:
        return replace(self, inner=self.inner.in_dtype(dtype))


def calibrated(logits: Tensor | Logits, calibration: Calibration) -> Logits:
    """The same logits, calibrated.

    Raises:
        UserError: a cache of drawn columns.
    """
    known = as_logits(logits)
    if calibration.changes_nothing:
        return known
    if isinstance(known, SparseLogits):
        return replace(known, values=_sparse(known, calibration.temperature), traits={}, text={})
    bias = torch.tensor(calibration.bias) if calibration.bias else None
    if isinstance(known, DenseLogits):  # a specialist's other outputs are divided too; biases are of classes
        other = None if known.other is None else known.other.float()
        made = DenseLogits(known.values.float(), other).divided(calibration.temperature)
        return made if bias is None else replace(made, values=made.values + moved(bias, made.values.device))
    return CalibratedLogits(known, calibration.temperature, bias)


def _sparse(logits: SparseLogits, temperature: float) -> SparseRows:
    """k + 1 outcomes at a temperature: p ** (1 / temperature) of each, divided by their sum.

    The tail counts as one outcome, which bounds the truth. Below temperature 1 a sum's power is above the sum of the
    powers, so that the tail is an upper bound of the true one, and the kept columns are lower bounds; above temperature
    1 it is the other way round. Stored traits are those of the teacher as it was, so they are dropped.
    """
    values = logits.values
    if values.tail is None:
        raise drawn(logits.name)
    outcomes = torch.cat([values.log_probs, values.tail[:, None]], -1) / temperature  # [m,k+1]
    outcomes = torch.log_softmax(outcomes, -1)
    return SparseRows(values.ids, outcomes[:, :-1], outcomes[:, -1], values.temperature)


def drawn(teacher: str, where: str = "@stage.teachers") -> UserError:
    """The error for a temperature on a cache of draws."""
    return UserError(
        f"the cache of teacher '{teacher}' holds draws, which have no temperature but the one they were drawn at",
        where=where,
        todo="give `calibrate` to the teacher in the cache stage, or make the cache with targets: top",
    )
