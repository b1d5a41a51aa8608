"""Losses on what a teacher says about the other classes, and about the other examples: DKD and DIST.

Both take logits [n,V] and return [n]. They read every column of both sides, so that a cache of a few columns per token
cannot serve them; whole class logits can.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.data.batch import NO_LABEL
from mtkd.losses.distributions import kl_between, log_distributions, scaled
from mtkd.losses.spec import loss


@loss("dkd", inputs=("logits",), needs=("labels", "columns"))
def dkd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 1.0,
    standardise: bool = False,
    labels: Tensor | None = None,
) -> Tensor:
    """Decoupled distillation: KL of target against the rest, and KL among the rest, each with its own weight.

    ``T^2 (alpha KL(b_T || b_S) + beta KL(q_T || q_S))`` with t the target, ``b = [p(t), 1 - p(t)]`` and
    ``q(v) = p(v) / (1 - p(t))``, v != t. `kl` is alpha = 1 and beta = 1 - p_T(t) of the teacher: it forgets the rest
    where the teacher is sure. The target is the label; at a position without one it is the teacher's choice, so that
    unlabelled texts can be used (the paper has labels everywhere). Several teachers have one target each, then.

    The paper's code multiplies the loss by min(epoch / 20, 1), which is left to the learning rate's warm-up, and hides
    the target by -1000 in the logits; here it is left out exactly. ``standardise``: see `mtkd.losses.distributions`.

    Args:
        labels: [n] int64, `NO_LABEL` where there is none; None: nowhere.
    Returns: [n], nats, T^2-scaled.
    Raises: ValueError for a negative alpha or beta.
    Source: Zhao et al. 2022, Decoupled Knowledge Distillation, arXiv 2203.08679, equations 5 to 7; temperature 4,
    alpha 1 and beta 8 are its code's for CIFAR-100.
    """
    for name, value in (("alpha", alpha), ("beta", beta)):
        if value < 0:
            raise ValueError(f"{name} is a weight, 0 or more; found {value}")
    log_s, log_t = log_distributions(student, teacher, temperature, 0, standardise)
    target = log_t.argmax(-1)
    if labels is not None:
        target = torch.where(labels == NO_LABEL, target, labels)
    (target_s, rest_s), (target_t, rest_t) = _decoupled(log_s, target[:, None]), _decoupled(log_t, target[:, None])
    against_rest = kl_between(target_t, target_s)
    among_rest = (rest_t.exp() * (rest_t - rest_s).scatter(-1, target[:, None], 0)).sum(-1)
    return temperature**2 * (alpha * against_rest + beta * among_rest)


def _decoupled(log_probs: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(log [p(t), 1 - p(t)] [n,2], log p(v) / (1 - p(t)) [n,V] with -inf at t) of log p [n,V] and t [n,1]."""
    # -inf and not a small number: the rest's probabilities may be small themselves.
    others = log_probs.scatter(-1, target, -torch.inf)
    rest = others.logsumexp(-1, keepdim=True)
    return torch.cat([log_probs.gather(-1, target), rest], -1), others - rest


@loss("dist_inter", inputs=("logits",), needs=("columns",))
def dist_inter(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0, scale: bool = True
) -> Tensor:
    """DIST between classes: 1 minus the correlation of the two distributions of a position, T^2-scaled.

    ``T^2 (1 - r(p_S, p_T))``, r Pearson's correlation over the columns. Shift and scale of the probabilities do not
    matter, so a student need not reach a strong teacher's confidence. Between 0 and 2 T^2.

    Returns: [n], no unit.
    Source: Huang et al. 2022, Knowledge Distillation from A Stronger Teacher, arXiv 2205.10536, equation 7. Its code
    adds 1e-8 to the product of the norms; here the product is at least 1e-12, so that a wide flat row counts too.
    """
    probs_s, probs_t = (x.exp() for x in log_distributions(student, teacher, temperature, 0))
    return scaled(1 - _correlation(probs_s, probs_t), temperature, scale)


@loss("dist_intra", inputs=("logits",), needs=("columns", "batch"))
def dist_intra(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0, scale: bool = True
) -> Tensor:
    """DIST within a class: 1 minus the correlation of its probabilities over a micro-batch's examples, mean of classes.

    ``T^2 mean_c (1 - r(p_S(c), p_T(c)))``, r Pearson's correlation over the n examples that count; every example has
    this value, so that the mean over a step is the mean of its micro-batches by their sizes. It is no sum over
    examples: **numbers depend on how a step is cut into micro-batches and ranks**, and a micro-batch of one example
    teaches nothing. The paper's is over the batch of a GPU. For classes only: tokens come in tiles.

    Returns: [n], no unit.
    Source: Huang et al. 2022, arXiv 2205.10536, equation 9.
    """
    probs_s, probs_t = (x.exp() for x in log_distributions(student, teacher, temperature, 0))
    counts = mask[:, None].to(probs_s.dtype)
    number = counts.sum().clamp_min(1)
    # Rows that do not count are put at the mean: they add nothing to a covariance.
    centred = [(x - (x * counts).sum(0) / number) * counts for x in (probs_s, probs_t)]
    value = (1 - _cosine(*(x.t() for x in centred))).mean()
    return scaled(value.expand(len(mask)), temperature, scale)


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation over the last axis, [m,k] each -> [m]; 0 where one side is constant."""
    return _cosine(a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True))


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(a, dim=-1) * torch.linalg.vector_norm(b, dim=-1)
    return (a * b).sum(-1) / norms.clamp_min(1e-12)
