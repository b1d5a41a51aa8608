"""Divergences between the class or token distributions of student and teacher.

All take logits [n,V] on both sides and return [n], in nats. With ``scale: true`` (the default) values are multiplied
by temperature^2, which keeps the gradient's size independent of the temperature (Hinton et al. 2015, section 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mtkd.registry import loss

LOGITS = ("logits", "nsp_logits")


def negative_entropy(log_probs: Tensor) -> Tensor:
    """``sum_v p(v) log p(v)`` of log-probabilities [n,V] -> [n], nats; columns with p = 0 count 0."""
    return (log_probs.exp() * log_probs.clamp_min(torch.finfo(log_probs.dtype).min)).sum(-1)


def no_term(log_probs: Tensor) -> Tensor:
    """0 for every position, [n]."""
    return log_probs.new_zeros(log_probs.shape[0])


@loss("kl", inputs=LOGITS, teacher_term=negative_entropy)
def kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0, scale: bool = True, top: int = 0
) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student), T^2-scaled.

    ``T^2 * sum_v p_T(v) (log p_T(v) - log p_S(v))`` with p = softmax(logits / T); includes the teacher's entropy, so
    identical models give exactly 0. Gradient with respect to the student's logits: ``T (p_S - p_T)``.

    With ``top: n`` the teacher's n most probable columns are compared one by one and all others as one bucket, the
    tail: a divergence of n + 1 outcomes. Nothing is renormalised: without the tail a student could move mass outside
    the teacher's support for free.

    Returns: [n], nats.
    Raises: ValueError for a temperature that is not positive or a negative `top`.
    Source: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv 1503.02531, section 2.
    """
    if top < 0:
        raise ValueError(f"top is a number of columns, 0 for all of them; found {top}")
    log_s, log_t = _log_probs(student, temperature), _log_probs(teacher, temperature)
    if 0 < top < log_t.shape[-1]:
        columns = log_t.topk(top, -1).indices
        log_s, log_t = _with_tail(log_s, columns), _with_tail(log_t, columns)
    return _scaled((log_t.exp() * (log_t - log_s)).sum(-1), temperature, scale)


def _with_tail(log_probs: Tensor, columns: Tensor) -> Tensor:
    """Log-probabilities [n,V] at some columns [n,k], and of all others together: [n,k+1]."""
    others = log_probs.scatter(-1, columns, -torch.inf)
    return torch.cat([log_probs.gather(-1, columns), others.logsumexp(-1, keepdim=True)], -1)


@loss("reverse_kl", inputs=LOGITS)
def reverse_kl(
    student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0, scale: bool = True
) -> Tensor:
    """Reverse Kullback-Leibler divergence KL(student || teacher), T^2-scaled: mode-seeking.

    ``T^2 * sum_v p_S(v) (log p_S(v) - log p_T(v))``.

    Returns: [n], nats.
    Source: Gu et al. 2023, MiniLLM, arXiv 2306.08543, equation 1.
    """
    log_s, log_t = _log_probs(student, temperature), _log_probs(teacher, temperature)
    return _scaled((log_s.exp() * (log_s - log_t)).sum(-1), temperature, scale)


@loss("jsd", inputs=LOGITS)
def jsd(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    scale: bool = True,
) -> Tensor:
    """Generalised Jensen-Shannon divergence; `beta` is the teacher's share of the mixture.

    ``beta KL(p_T || m) + (1-beta) KL(p_S || m)`` with ``m = beta p_T + (1-beta) p_S``. Libraries disagree on the side
    of beta; this is the paper's (and TRL's). beta must lie strictly between 0 and 1: at the ends the expression is 0
    everywhere; use `kl` or `reverse_kl`, its limits after division by beta or 1-beta.

    Returns: [n], nats, T^2-scaled.
    Raises: ValueError for beta outside (0, 1).
    Source: Agarwal et al. 2023, On-Policy Distillation of Language Models (GKD), arXiv 2306.13649, equation 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, both excluded; found {beta}")
    log_s, log_t = _log_probs(student, temperature), _log_probs(teacher, temperature)
    probs_s, probs_t = log_s.exp(), log_t.exp()
    # The derivative through m is the same for every column and vanishes in the softmax, so m needs no graph. Where both
    # sides underflow their terms are 0 whatever log m is, as long as it is finite.
    with torch.no_grad():
        mixture = torch.lerp(probs_s, probs_t, beta)
        log_m = mixture.clamp_min_(torch.finfo(mixture.dtype).tiny).log_()
    to_teacher = (probs_t * (log_t - log_m)).sum(-1)
    to_student = (probs_s * (log_s - log_m)).sum(-1)
    return _scaled(beta * to_teacher + (1 - beta) * to_student, temperature, scale)


@loss("soft_ce", inputs=LOGITS, zero_at_equality=False, teacher_term=no_term)
def soft_ce(student: Tensor, teacher: Tensor, mask: Tensor, *, temperature: float = 1.0, scale: bool = True) -> Tensor:
    """Cross entropy of the student against the teacher's soft targets, T^2-scaled.

    ``-T^2 * sum_v p_T(v) log p_S(v)``: `kl` plus the teacher's entropy; the same gradient.

    Returns: [n], nats.
    Source: Hinton et al. 2015, arXiv 1503.02531, section 2; TinyBERT (Jiao et al. 2019, arXiv 1909.10351), equation 10.
    """
    log_s, log_t = _log_probs(student, temperature), _log_probs(teacher, temperature)
    return _scaled(-(log_t.exp() * log_s).sum(-1), temperature, scale)


def _log_probs(logits: Tensor, temperature: float) -> Tensor:
    if temperature <= 0:
        raise ValueError(f"temperature must be positive; found {temperature}")
    return torch.log_softmax(logits if temperature == 1.0 else logits / temperature, -1)


def _scaled(values: Tensor, temperature: float, scale: bool) -> Tensor:
    return values * temperature**2 if scale and temperature != 1.0 else values
