"""The gradient of the reverse KL divergence from the words that a student wrote: one number per token and teacher."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mtkd.data.batch import NO_LABEL
from mtkd.losses.distributions import log_distribution, scaled
from mtkd.losses.spec import loss


@loss("policy_gradient", inputs=("logits",), constant_weights=True, signed=True, needs=("labels", "behaviour"))
def policy_gradient(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    *,
    gate: tuple[float, float] = (0.2, 5.0),
    against: str = "student",
    temperature: float = 1.0,
    labels: Tensor | None = None,
    behaviour: Tensor | None = None,
) -> Tensor:
    """Policy gradient of on-policy distillation: the reverse KL divergence by the token that the student wrote.

    ``-rho A``, ``rho = p_S(y) / p_old(y)`` with a gradient, ``A = log p_T(y) - log p_S(y)`` without one, T^2-scaled;
    p_old is the student that wrote y, p = softmax(logits / temperature). Where rho is outside the gate the loss is
    0, and the position still counts. Without a gate the mean over what p_old writes is `reverse_kl`, in value and
    gradient, however far the student has moved. Weighted teachers add up as those of `reverse_kl` do: weights of sum 1
    give ``A = sum_k w_k log p_k(y) - log p_S(y)``; the row's ``ensemble: probabilities`` takes log of the mixture.

    ``against: writer`` has log p_old in A. It is the same for the first step on a text (`reuse: 1`); afterwards its
    gradient is that of ``KL(p_S || p_T) - KL(p_S || p_old)``.

    Args:
        labels: the written tokens y, [n] int64, `NO_LABEL` where there is none; None: the teacher's choices.
        behaviour: log p_old(y), nats, [n]; None: the student is as it was.
    Returns: [n], nats; of either sign.
    Raises: ValueError for a gate without 1 in it, or another `against`.
    Source: Xiaomi 2026, MiMo-V2-Flash, arXiv 2601.02780 (MOPD, with the gate of ICE-POP); Thinking Machines 2025,
    On-Policy Distillation.
    """
    low, high = _checked(gate)
    if against not in ("student", "writer"):
        raise ValueError(f"against is student or writer; found {against!r}")
    tokens = (teacher.argmax(-1) if labels is None else labels.masked_fill(labels == NO_LABEL, 0))[:, None]
    mine = log_distribution(student, temperature).gather(-1, tokens).squeeze(-1)
    wanted = log_distribution(teacher, temperature).gather(-1, tokens).squeeze(-1)
    now = mine.detach()
    old = now if behaviour is None else behaviour.to(now.dtype)
    least = math.log(low) if low else -math.inf
    outside = (now - old < least) | (now - old > math.log(high))
    # gated before exp: of a ratio that overflows neither value nor gradient is read
    ratio = (mine - old).masked_fill(outside, 0).exp()
    advantage = (wanted - (now if against == "student" else old)).detach()
    return scaled((-ratio * advantage).masked_fill(outside, 0), temperature, True)


def _checked(gate: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest ratio."""
    numbers = len(gate) == 2 and all(isinstance(x, int | float) for x in gate)
    if not numbers or not 0 <= gate[0] <= 1 <= gate[1]:
        raise ValueError(f"gate is the lowest and the highest ratio, with 1 between them; found {list(gate)}")
    return float(gate[0]), float(gate[1])
