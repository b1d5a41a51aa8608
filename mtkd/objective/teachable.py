"""Positions at which a student can learn from its teachers: their mass lies on what it holds possible itself.

A teacher whose mass is elsewhere pulls the student to words that it would hardly write; one that moves mass among the
student's own candidates corrects it.

Source: Wang et al. 2026, Not All Disagreement Is Learnable: Token Teachability in On-Policy Distillation, arXiv
2605.26844 (TA-OPD). The paper keeps the best few percent of positions by a score; here a threshold on the mass itself
decides, so that a position's fate does not depend on the others of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mtkd.models.features import SparseRows
from mtkd.objective.compile import Row
from mtkd.objective.kept import completed


@torch.no_grad()
def teachable(row: Row, student: Tensor, teachers: Sequence[Tensor | SparseRows], weights: Tensor) -> Tensor:
    """Where ``sum_k w_k p_k(C) >= mass``, C the student's most probable columns; [m] bool.

    Args:
        row: whose ``teachable`` says how many candidates, and the mass.
        student: [m,V].
        teachers: T of [m,V], or sparse: then the student completes them.
        weights: [T,m]; of any sum, their shares count.
    """
    how = row.match.candidates
    columns = student.topk(min(how.top, student.shape[-1]), -1).indices  # [m,k]
    shares = weights.abs() if row.match.weighted else torch.ones_like(weights)
    shares = shares / shares.sum(0).clamp_min(1e-30)
    mass = torch.zeros(len(student), device=student.device)
    for share, teacher in zip(shares, teachers, strict=True):
        whole, _ = completed(row, student, teacher)
        whole = whole.float()
        mass += share * (whole.gather(-1, columns).logsumexp(-1) - whole.logsumexp(-1)).exp()
    return mass >= how.mass
