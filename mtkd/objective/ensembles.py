"""The loss of one logits row over several teachers: a sum of losses, or one loss against their mixture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mtkd.losses.distributions import log_distribution, standardised
from mtkd.losses.spec import LossSpec
from mtkd.models.features import SparseRows
from mtkd.objective.compile import Row
from mtkd.objective.kept import completed


def ensemble_losses(
    row: Row,
    student: Tensor,
    teachers: Sequence[Tensor | SparseRows],
    weights: Tensor,
    mask: Tensor | None,
    labels: Tensor | None = None,
    behaviour: Tensor | None = None,
) -> Tensor:
    """Per-position loss of one logits row over all teachers.

    Args:
        student: [m,V].
        teachers: T of [m,V], or sparse: then the student completes them.
        weights: [T,m].
        mask: [m], or None when every position counts.
        labels, behaviour: [m], for a loss that needs them.

    Returns:
        [m]. ``losses``: ``sum_k w_k l(s, t_k)``. ``probabilities`` and ``logits``: ``(sum_k w_k) l(s, mixture)``, the
        mixture arithmetic (of softmax at the row's temperature) or geometric (of logits), with weights of sum 1.
    """
    if not row.match.weighted:
        weights = torch.ones_like(weights)
    spec, options, ensemble = row.spec, row.match.options, row.match.ensemble
    pairs = [completed(row, student, teacher) for teacher in teachers]  # T of ([m,V], options)
    wholes = [whole for whole, _ in pairs]
    # A single teacher needs no mixture: the plain loss, bit by bit.
    if len(teachers) == 1:
        return weights[0] * spec(student, wholes[0], mask, pairs[0][1], labels, behaviour)
    if ensemble == "losses" and spec.mixes(options):
        assert spec.teacher_term is not None
        mixed, constant = _mixture(spec.teacher_term, wholes, weights, mask, spec.temperature(options)[0])
        return soft_target_losses(spec, student, mixed, constant, mask, options)
    if ensemble == "losses":
        losses = [
            w * spec(student, t, mask, own, labels, behaviour) for w, (t, own) in zip(weights, pairs, strict=True)
        ]
        return torch.stack(losses).sum(0)
    if options.get("standardise"):
        # Each teacher by itself: their mixture has another mean and deviation, where the loudest counts most.
        student, *wholes = (standardised(_keep(x, mask).float()) for x in (student, *wholes))
        options = {**options, "standardise": False}
    total = weights.sum(0)  # [m]
    shares = weights / total.clamp_min(1e-30)  # [T,m]; where all weights are 0 the loss is 0, not 0/0
    temperature, _ = spec.temperature(options)
    mixture = _averaged(wholes, shares, None if ensemble == "logits" else temperature)
    return total * spec(student, mixture, mask, options, labels, behaviour)


def _averaged(logits: Sequence[Tensor], shares: Tensor, temperature: float | None) -> Tensor:
    """Logits [m,V] of a mixture of T teachers with shares [T,m] of sum 1.

    Args:
        temperature: where probabilities are averaged; None: logits are.
    """
    if temperature is None:
        return torch.as_tensor(sum(w[:, None] * t for w, t in zip(shares, logits, strict=True)))
    probs = torch.as_tensor(
        sum(w[:, None] * torch.softmax(t / temperature, -1) for w, t in zip(shares, logits, strict=True))
    )
    # A probability that underflows has no logarithm; the smallest float's is finite and weighs nothing.
    return probs.clamp_min(torch.finfo(probs.dtype).tiny).log() * temperature


def soft_target_losses(
    spec: LossSpec,
    student: Tensor,
    mixed: Tensor,
    constant: Tensor,
    mask: Tensor | None,
    options: Mapping[str, object],
) -> Tensor:
    """``T^2 (sum_k w_k c(p_k) - <sum_k w_k p_k, log p_S>)``, [m]: the student is read once for any T.

    Args:
        mixed: the teachers' mixture, [m,V].
        constant: the part without the student, [m].
    """
    temperature, factor = spec.temperature(options)
    log_student = _log_probs(student, mask, temperature)
    values = factor * (constant - (mixed * log_student).sum(-1))
    return values if mask is None else values.masked_fill(~mask, 0)


def _mixture(
    teacher_term: Callable[[Tensor, Tensor], Tensor],
    teachers: Sequence[Tensor],
    weights: Tensor,
    mask: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """``sum_k w_k p_k`` [m,V] and ``sum_k w_k c(p_k)`` [m]: each teacher's logits are read by one softmax."""
    learned = weights.requires_grad and torch.is_grad_enabled()
    mixed = torch.zeros_like(teachers[0], dtype=torch.float32)
    constant = mixed.new_zeros(len(mixed))
    for weight, teacher in zip(weights, teachers, strict=True):
        log_probs = _log_probs(teacher, mask, temperature)
        probs = log_probs.exp()
        constant = constant + weight * teacher_term(log_probs, probs)
        if learned:  # the weights' gradients need every teacher's own probabilities, so memory holds T of [m,V]
            mixed = mixed + weight[:, None] * probs
        else:
            mixed.addcmul_(probs, weight[:, None])
    return mixed, constant


def _log_probs(logits: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    return log_distribution(_keep(logits, mask), temperature)


def _keep(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Logits with 0 in the rows that do not count."""
    return logits if mask is None else logits.masked_fill(~mask[:, None], 0)
