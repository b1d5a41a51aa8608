"""Find the teacher that overflowed: after a step without a finite loss, every teacher runs on its batches again.

Training looks at the loss alone, since a look at every teacher in every step would make a GPU wait. This costs one
forward pass of the teachers, once, in a run that ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.errors import NonFiniteError
from mtkd.models.broken import remedy
from mtkd.models.features import ATTENTION, Features, SparseLogits, as_logits, split_key
from mtkd.running.build import BuiltStage

_TILE = 256  # rows of logits at a time: at 150,000 columns 150 MB in float32


def check_teachers(built: BuiltStage, batches: Sequence[Batch], dtype: torch.dtype) -> None:
    """Look whether what the objective reads of the teachers is finite on these batches. A collective.

    Args:
        batches: this rank's micro-batches; every rank has as many.
        dtype: teachers run in.

    Raises:
        NonFiniteError: naming the first teacher for which it is not, at its place; on every rank.
    """
    pool = built.pool
    for position, (teacher, wants) in enumerate(zip(pool.teachers, pool.wants, strict=True)):
        read = sorted(key for key in wants if split_key(key)[0] not in ATTENTION)  # masked scores are -inf
        counts = torch.zeros(len(read), dtype=torch.float64)
        for batch in batches:
            features = pool.ask(position, batch)
            counts += torch.tensor([_broken(features, key, batch) for key in read], dtype=torch.float64)
        broken = built.engine.dist.sum(counts.tolist())
        if any(broken):
            where = f"stages.{built.name}.teachers[{position}]"
            places = ", ".join(
                f"{key} at {number:.0f} places" for key, number in zip(read, broken, strict=True) if number
            )
            raise overflowing(teacher.name, where, places, dtype)


def overflowing(teacher: str, where: str, what: str, dtype: torch.dtype) -> NonFiniteError:
    """The error for a teacher that gives NaN or infinity.

    Args:
        what: the features with such numbers, and where in the data.
        dtype: teachers run in.
    """
    return NonFiniteError(
        f"teacher '{teacher}' gives numbers that are not finite: it overflows, or its weights are damaged",
        where=where,
        found=f"{what}, in {dtype}".replace("torch.", ""),
        todo=remedy(dtype),
    )


def _broken(features: Features, key: str, batch: Batch) -> int:
    """Rows of a feature that hold NaN or infinity, among those that count."""
    value = features[key]
    if isinstance(value, SparseLogits):  # looked at when the cache was made
        return 0
    if split_key(key)[0] in ("hidden", "embedding"):
        assert isinstance(value, Tensor)
        return _rows_broken(value[batch.attention_mask.bool()])
    if split_key(key)[0] == "cls":
        assert isinstance(value, Tensor)
        return _rows_broken(value)
    index = _counted(key, batch).reshape(-1).nonzero().squeeze(-1)
    return sum(_rows_broken(as_logits(value).rows(part)) for part in index.split(_TILE))


def _counted(key: str, batch: Batch) -> Tensor:
    """Mask of the logits of real tokens [B,L] or examples [B]; a batch may be filled up with empty rows."""
    of_tokens = key == "logits" and batch.targets.dim() == 2
    return batch.attention_mask.bool() if of_tokens else batch.attention_mask.bool().any(-1)


def _rows_broken(rows: Tensor) -> int:
    return int((~rows.isfinite().all(-1)).sum())
