"""The error for a model that overflows, or whose weights are damaged: the same words in every place."""

from __future__ import annotations

import torch

from mtkd.errors import DataError


class Overflow(DataError):
    """Logits that are NaN or infinite."""


def broken_weights(where: str, found: str) -> DataError:
    """NaN or infinity among the weights.

    Args:
        where: file or block of the teacher.
        found: names of weights.
    """
    return DataError("the teacher's weights are not finite", where=where, found=found, todo=remedy(torch.float32))


def overflowing_model(where: str, dtype: torch.dtype) -> Overflow:
    """Logits of a first try that are NaN or infinite, from weights that are finite.

    Args:
        dtype: it was run in.
    """
    return Overflow(
        "the model gives numbers that are not finite: it overflows, or its weights are damaged",
        where=where,
        found=f"logits of two tokens, in {dtype}".replace("torch.", ""),
        todo=remedy(dtype),
    )


def remedy(dtype: torch.dtype) -> str:
    """What helps.

    Args:
        dtype: the model is run in.
    """
    wider = "set engine.precision: fp32, " if dtype != torch.float32 else ""
    return f"{wider}take other weights of it (a conversion to fp16 ends at 65,504), or drop this teacher"
