"""Losses against labels: the "hard" rows of the method table."""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.losses.spec import loss


@loss("ce", inputs=("logits", "nsp_logits"), labels=True, zero_at_equality=False)
def ce(student: Tensor, labels: Tensor, mask: Tensor, *, smoothing: float = 0.0) -> Tensor:
    """Cross entropy with class, token or masked-token labels: ``-log softmax(s)[y]``, optionally label-smoothed.

    Args:
        student: [n,V].
        labels: [n] int64.
    Returns: [n], nats.
    Raises: ValueError for a smoothing outside [0, 1].
    Source: Szegedy et al. 2015, arXiv 1512.00567, section 7, for the smoothing.
    """
    if not 0 <= smoothing <= 1:
        raise ValueError(f"smoothing must be between 0 and 1; found {smoothing}")
    return torch.nn.functional.cross_entropy(student, labels, label_smoothing=smoothing, reduction="none")


@loss("label_mse", inputs=("logits",), labels=True, zero_at_equality=False)
def label_mse(student: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Squared error of a one-column output against a number (regression tasks): ``(s - y)^2``.

    Args:
        student: [n,1].
        labels: [n] float32.
    Returns: [n], squared label units.
    """
    return (student.squeeze(-1) - labels).square()
