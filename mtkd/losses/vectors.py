"""Distances between hidden states (or logits as plain vectors), over the last axis.

[..., X] on both sides -> [...]; student and teacher have equal widths here, the objective projects first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.losses.spec import loss


@loss("mse")
def mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error over the last axis: ``mean_j (s_j - t_j)^2``.

    Returns: [B,L], [B] or [n].
    Source: TinyBERT (Jiao et al. 2019, arXiv 1909.10351), equations 7 to 9.
    """
    return (student - teacher).square().mean(-1)


@loss("normalized_mse")
def normalized_mse(student: Tensor, teacher: Tensor, mask: Tensor, *, sum_over_width: bool = False) -> Tensor:
    """Squared distance of L2-normalised vectors: invariant to a positive scale of either side.

    ``mean_j (s_j/|s| - t_j/|t|)^2``; the paper sums over the width (``sum_over_width: true``), its code takes the mean:
    a factor of H.

    Returns: [B,L], [B] or [n].
    Source: BERT-PKD (Sun et al. 2019, arXiv 1908.09355), equation 7.
    """
    normalize = torch.nn.functional.normalize
    squares = (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square()
    return squares.sum(-1) if sum_over_width else squares.mean(-1)


@loss("cosine")
def cosine(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance ``1 - cos(s, t)``, between 0 and 2.

    Returns: [B,L], [B] or [n].
    Source: DistilBERT (Sanh et al. 2019, arXiv 1910.01108), section 3.
    """
    return 1 - torch.nn.functional.cosine_similarity(student, teacher, dim=-1)
