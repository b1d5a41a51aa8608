"""Divergences between the class or token distributions of student and teacher.

All take logits [n,V] on both sides and return [n], in nats. With ``scale: true`` (the default) values are multiplied
by temperature^2, which keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2).

With ``top: n`` the teacher's n most probable columns are compared one by one and all others as one bucket, the tail: a
divergence of n + 1 outcomes. Nothing is renormalised: without the tail a student could move mass outside the teacher's
support for free.

With ``standardise: true`` the logits of either side become z-scores before the temperature: ``(z - mean(z)) / (std(z) +
1e-7)`` over the columns of a position. The relations between logits are left, and not their size, so a flat teacher is
no softer than a sharp one. The deviation divides by n, as in the paper; its code divides by n - 1. Every teacher is
standardised by itself, before it meets others. Source: Sun et al. 2024, Logit Standardization in Knowledge
Distillation, arXiv 2403.01427, algorithm 1, with temperature 2 and T^2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.losses.spec import loss

LOGITS = ("logits", "nsp_logits")


def negative_entropy(log_probs: Tensor, probs: Tensor) -> Tensor:
    """``sum_v p(v) log p(v)`` of (log-)probabilities [n,V] -> [n], nats; columns with p = 0 count 0."""
    return torch.linalg.vecdot(probs, log_probs.clamp_min(torch.finfo(log_probs.dtype).min))


def no_term(log_probs: Tensor, probs: Tensor) -> Tensor:
    """0 for every position, [n]."""
    return log_probs.new_zeros(log_probs.shape[0])


@loss("kl", inputs=LOGITS, teacher_term=negative_entropy)
def kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student), T^2-scaled.

    ``T^2 * sum_v p_T(v) (log p_T(v) - log p_S(v))`` with p = softmax(logits / T); includes the teacher's entropy, so
    identical models give exactly 0. Gradient with respect to the student's logits: ``T (p_S - p_T)``.

    Returns: [n], nats.
    Raises: ValueError for a temperature that is not positive or a negative `top`.
    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled(kl_between(log_t, log_s), temperature, scale)


@loss("reverse_kl", inputs=LOGITS)
def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(student || teacher), T^2-scaled: mode-seeking.

    ``T^2 * sum_v p_S(v) (log p_S(v) - log p_T(v))``.

    Returns: [n], nats.
    Source: Gu et al. 2023, MiniLLM, arXiv 2306.08543, equation 1.
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled(kl_between(log_s, log_t), temperature, scale)


@loss("jsd", inputs=LOGITS)
def jsd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture.

    ``beta KL(p_T || m) + (1-beta) KL(p_S || m)`` with ``m = beta p_T + (1-beta) p_S``. Libraries disagree on the side
    of beta; this is the paper's (and TRL's). At the ends the expression is 0 everywhere; there the loss is its limit
    after division by beta or 1-beta, as in TRL: ``beta: 0`` is `kl`, ``beta: 1`` is `reverse_kl`. Mind the jump: a
    beta of 0.01 is about 0.01 `kl`.

    Returns: [n], nats, T^2-scaled.
    Raises: ValueError for beta outside [0, 1].
    Source: Agarwal et al. 2023, On-Policy Distillation of Language Models (GKD), arXiv 2306.13649, equation 1.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be between 0 and 1; found {beta}")
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    if beta in (0, 1):
        return scaled(kl_between(log_s, log_t) if beta else kl_between(log_t, log_s), temperature, scale)
    probs_s, probs_t = log_s.exp(), log_t.exp()
    # The derivative through m is the same for every column and vanishes in the softmax, so m needs no graph. Where both
    # sides underflow their terms are 0 for any finite log m.
    with torch.no_grad():
        log_m = _log(torch.lerp(probs_s, probs_t, beta))
    to_teacher = (probs_t * (log_t - log_m)).sum(-1)
    to_student = (probs_s * (log_s - log_m)).sum(-1)
    return scaled(beta * to_teacher + (1 - beta) * to_student, temperature, scale)


@loss("skew_kl", inputs=LOGITS)
def skew_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Skew Kullback-Leibler divergence: of the teacher from a mixture that holds a share `alpha` of the teacher.

    ``KL(p_T || alpha p_T + (1-alpha) p_S)``, T^2-scaled. ``alpha: 0`` is `kl`; towards 1 it vanishes. Bounded by
    ``-log alpha``, and so is the gradient where the student has no mass.

    Returns: [n], nats.
    Raises: ValueError for alpha outside [0, 1).
    Source: Ko et al. 2024, DistiLLM, arXiv 2402.03898 (SKL).
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled(_skewed(log_t, log_s, alpha), temperature, scale)


@loss("reverse_skew_kl", inputs=LOGITS)
def reverse_skew_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    alpha: float = 0.1,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Skew reverse Kullback-Leibler divergence: of the student from a mixture that holds a share `alpha` of it.

    ``KL(p_S || (1-alpha) p_T + alpha p_S)``, T^2-scaled. ``alpha: 0`` is `reverse_kl`; bounded by ``-log alpha``.

    Returns: [n], nats.
    Raises: ValueError for alpha outside [0, 1).
    Source: Ko et al. 2024, DistiLLM, arXiv 2402.03898 (SRKL).
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled(_skewed(log_s, log_t, alpha), temperature, scale)


@loss("total_variation", inputs=LOGITS)
def total_variation(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Total variation distance of the two distributions: ``1/2 sum_v |p_T(v) - p_S(v)|``, at most 1 before scaling.

    Symmetric. Multiplied by T^2 like the other divergences, though its gradient shrinks with 1/T only: lower the
    row's weight at a high temperature, or say ``scale: false``.

    Returns: [n], a difference of probabilities.
    Source: Wen et al. 2023, f-Divergence Minimization for Sequence-Level Knowledge Distillation, arXiv 2307.15190.
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled((log_s.exp() - log_t.exp()).abs().sum(-1) / 2, temperature, scale)


@loss("adaptive_kl", inputs=LOGITS, constant_weights=True)
def adaptive_kl(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    mu: float = 0.5,
    temperature: float = 1.0,
    scale: bool = True,
    standardise: bool = False,
) -> Tensor:
    """Forward and reverse KL, each as important as the teacher's head and tail are still missed.

    The head is the smallest set of the teacher's most probable columns whose mass reaches `mu`, the tail all others;
    g is the gap ``sum |p_T - p_S|`` over head or tail:
    ``(g_head KL(p_T || p_S) + g_tail KL(p_S || p_T)) / (g_head + g_tail)``, T^2-scaled. The gaps are weights, not a
    part of the objective: no gradient goes through them.

    Returns: [n], nats.
    Raises: ValueError for mu outside (0, 1).
    Source: Wu et al. 2024, Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models,
    arXiv 2404.02657 (AKL).
    """
    if not 0 < mu < 1:
        raise ValueError(f"mu is a probability between 0 and 1, both excluded; found {mu}")
    log_s, log_t = log_distributions(student, teacher, temperature, 0, standardise)
    share = _head_share(log_s.detach().exp(), log_t.detach().exp(), mu)
    return scaled(share * kl_between(log_t, log_s) + (1 - share) * kl_between(log_s, log_t), temperature, scale)


def _head_share(probs_s: Tensor, probs_t: Tensor, mu: float) -> Tensor:
    """``g_head / (g_head + g_tail)`` of `adaptive_kl`, [n]; 0 where the sides are equal."""
    # A head is a few columns as a rule: sorting all of a vocabulary would cost more than the rest of the loss.
    width = min(64, probs_t.shape[-1])
    largest, columns = probs_t.topk(width, -1)
    while width < probs_t.shape[-1] and not bool((largest.sum(-1) >= mu).all()):
        width = min(8 * width, probs_t.shape[-1])
        largest, columns = probs_t.topk(width, -1)
    in_head = largest.cumsum(-1) - largest < mu
    gap = (probs_t - probs_s).abs()
    return (gap.gather(-1, columns) * in_head).sum(-1) / gap.sum(-1).clamp_min(torch.finfo(gap.dtype).tiny)


@loss("todi", inputs=LOGITS, constant_weights=True)
def todi(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    beta: float = 1.0,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Forward and reverse KL column by column: forward where the student is too low, reverse where it is too high.

    ``sum_v a_v p_T (log p_T - log p_S) + (1 - a_v) p_S (log p_S - log p_T)`` at v, ``a_v = sigmoid(beta (log p_T(v) -
    log p_S(v)))``, T^2-scaled. The a_v are weights, not a part of the objective: no gradient goes through them.

    Returns: [n], nats; a column's term may be negative, and the sum with unequal weights, too.
    Raises: ValueError for a negative beta.
    Source: Jung et al. 2025, ToDi: Token-wise Distillation via Fine-Grained Divergence Control, arXiv 2505.16297.
    """
    if beta < 0:
        raise ValueError(f"beta must be 0 or more; found {beta}")
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    gap = log_t - log_s  # [n,V]
    share = torch.sigmoid(beta * gap.detach())
    return scaled(((share * log_t.exp() - (1 - share) * log_s.exp()) * gap).sum(-1), temperature, scale)


@loss("soft_ce", inputs=LOGITS, zero_at_equality=False, teacher_term=no_term)
def soft_ce(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    temperature: float = 1.0,
    scale: bool = True,
    top: int = 0,
    standardise: bool = False,
) -> Tensor:
    """Cross entropy of the student against the teacher's soft targets, T^2-scaled.

    ``-T^2 * sum_v p_T(v) log p_S(v)``: `kl` plus the teacher's entropy; the same gradient.

    Returns: [n], nats.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; TinyBERT (Jiao et al. 2019, arXiv 1909.10351), equation 10.
    """
    log_s, log_t = log_distributions(student, teacher, temperature, top, standardise)
    return scaled(-(log_t.exp() * log_s).sum(-1), temperature, scale)


def log_distributions(
    student: Tensor, teacher: Tensor, temperature: float, top: int, standardise: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of student and teacher, [n,V], or [n,top+1] with the tail as the last outcome."""
    if top < 0:
        raise ValueError(f"top is a number of columns, 0 for all of them; found {top}")
    if standardise:
        student, teacher = standardised(student), standardised(teacher)
    log_s, log_t = log_distribution(student, temperature), log_distribution(teacher, temperature)
    if 0 < top < log_t.shape[-1]:
        columns = log_t.topk(top, -1).indices
        log_s, log_t = _with_tail(log_s, columns), _with_tail(log_t, columns)
    return log_s, log_t


def _with_tail(log_probs: Tensor, columns: Tensor) -> Tensor:
    """Log-probabilities [n,V] at some columns [n,k], and of all others together: [n,k+1]."""
    others = log_probs.scatter(-1, columns, -torch.inf)
    return torch.cat([log_probs.gather(-1, columns), others.logsumexp(-1, keepdim=True)], -1)


def kl_between(of: Tensor, from_: Tensor) -> Tensor:
    """``sum_v p(v) (log p(v) - log q(v))`` of log p and log q, [n,V] each -> [n]."""
    return (of.exp() * (of - from_)).sum(-1)


def _skewed(of: Tensor, from_: Tensor, alpha: float) -> Tensor:
    """``KL(p || alpha p + (1-alpha) q)`` of log p and log q, [n,V] each -> [n]."""
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha must be at least 0 and below 1; found {alpha}")
    if alpha == 0:
        return kl_between(of, from_)
    probs = of.exp()
    return (probs * (of - _log(torch.lerp(from_.exp(), probs, alpha)))).sum(-1)


def _log(mixture: Tensor) -> Tensor:
    """log, finite where a probability underflows to 0."""
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


def log_distribution(logits: Tensor, temperature: float) -> Tensor:
    """``log softmax(logits / temperature)``; ValueError for a temperature outside 0.001 to 1,000,000."""
    if not 1e-3 <= temperature <= 1e6:
        raise ValueError(f"temperature must be positive, 0.001 to 1,000,000; found {temperature:g}")
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def standardised(logits: Tensor) -> Tensor:
    """Logits [n,V] with mean 0 and standard deviation 1 over the columns; 0 where all columns are equal."""
    centred = logits - logits.mean(-1, keepdim=True)
    # A norm has the gradient 0 where it is 0; the root of a variance would have NaN.
    deviation = torch.linalg.vector_norm(centred, dim=-1, keepdim=True) / logits.shape[-1] ** 0.5
    return centred / (deviation + 1e-7)


def scaled(values: Tensor, temperature: float, scale: bool) -> Tensor:
    return values * temperature**2 if scale and temperature != 1.0 else values
