"""Losses on attention maps and on relations between query, key or value vectors.

Each returns one value per query position, [B,L]: the mean over heads, and over the keys that the position may see.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.losses.spec import loss

# Below the smallest probability a float32 softmax can tell from 0; keeps log and its gradient finite.
_TINY = 1e-30


@loss("attention_mse", inputs=("scores",))
def attention_mse(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of attention scores; masked entries (-inf on either side) contribute 0.

    ``mean_{a,j} (A^S_aij - A^T_aij)^2`` over heads a and visible keys j. Only masked entries are left out: large
    negative scores are real information.

    Args:
        student, teacher: scores [B,A,L,L].
    Returns: [B,L].
    Source: TinyBERT (Jiao et al. 2019, arXiv 1909.10351), equation 7.
    """
    # -inf is a mask; NaN is a fault and must reach the loss
    visible = (student != -torch.inf) & (teacher != -torch.inf) & mask[:, None, None, :]
    difference = student.masked_fill(~visible, 0) - teacher.masked_fill(~visible, 0)
    # heads and keys together: a mean over visible (head, key) pairs, the same count for every head
    return difference.square().sum((1, 3)) / visible.sum((1, 3)).clamp_min(1)


@loss("attention_kl", inputs=("probs",))
def attention_kl(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher || student) of attention probabilities, mean over heads.

    ``1/A sum_a sum_j P^T_aij (log P^T_aij - log P^S_aij)``. The inputs are probabilities already; a second softmax
    would make the loss about 1,000 times too small.

    Args:
        student, teacher: probs [B,A,L,L].
    Returns: [B,L], nats.
    Source: MiniLM (Wang et al. 2020, arXiv 2002.10957), equation 3.
    """
    padded = ~mask[:, None, None, :]
    student, teacher = student.masked_fill(padded, 0), teacher.masked_fill(padded, 0)
    log_ratio = teacher.clamp_min(_TINY).log() - student.clamp_min(_TINY).log()
    return (teacher * log_ratio).sum(-1).mean(1)


@loss("relation_kl", inputs=("query", "key", "value"))
def relation_kl(student: Tensor, teacher: Tensor, mask: Tensor, *, heads: int = 0) -> Tensor:
    """KL between self-relations ``softmax(X X^T / sqrt(d))`` of query, key or value vectors, mean over relation heads.

    With ``heads: R`` the model's heads are joined and split into R relation heads of width d (MiniLMv2: 48 or 64), so
    student and teacher need not have equal head counts; with 0 the model's own heads are used (MiniLM's value
    relation). Padded keys are left out of the softmax. Invariant to an orthogonal rotation inside a relation head.

    Args:
        student, teacher: [B,A,L,D], A and D may differ when `heads` is given.
    Returns: [B,L], nats.
    Raises: ValueError when `heads` does not divide a side's total width.
    Source: MiniLM (arXiv 2002.10957), equation 5; MiniLMv2 (Wang et al. 2020, arXiv 2012.15828), equations 2 to 4.
    """
    padded = ~mask[:, None, None, :]
    log_s, log_t = (_relation(x, mask, heads).masked_fill(padded, 0) for x in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(-1).mean(1)


def _relation(vectors: Tensor, mask: Tensor, heads: int) -> Tensor:
    """log softmax(X X^T / sqrt(d)) over unpadded keys, [B,R,L,L]."""
    if heads:
        batch, _, length, _ = vectors.shape
        joined = vectors.transpose(1, 2).reshape(batch, length, -1)
        if joined.shape[-1] % heads:
            raise ValueError(f"{heads} relation heads do not divide a total width of {joined.shape[-1]}")
        vectors = joined.reshape(batch, length, heads, -1).transpose(1, 2)
    scores = vectors @ vectors.transpose(-1, -2) / vectors.shape[-1] ** 0.5
    # A large finite number, not -inf: a row without any key would be NaN, in the gradient too.
    return torch.log_softmax(scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min), -1)
