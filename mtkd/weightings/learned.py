"""Weights that are trained: what mixture of the teachers predicts labels best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mtkd.data.batch import Batch
from mtkd.data.device import moved
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.draws import uniform
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits

_GATES = ("none", "pooled")


def gate_state(traits: Traits) -> Tensor:
    """The student's pooled hidden state, layer-normalised and divided by its width, [B,H].

    Divided, because Adam moves every parameter by about its learning rate: a product with the state then moves by no
    more than a single parameter does, for any width.
    """
    pooled = traits.pooled.float()
    return nn.functional.layer_norm(pooled, pooled.shape[-1:]) / pooled.shape[-1]


def _reads(options: Mapping[str, Any], num_teachers: int) -> list[str]:
    """The gate reads the student; the penalty, of several teachers alone, their likelihood of the labels."""
    gate = ["pooled"] if options.get("gate") == "pooled" else []
    return gate if num_teachers == 1 else [*gate, "ce"]


@weighting("learned", needs_labels=True, reads=_reads, per_token=lambda options: options.get("gate") != "pooled")
class Learned(Weighting):
    """``w = softmax(theta)``, or ``w(x) = softmax(theta + W h(x))`` with ``gate: pooled``; trained by an anchor.

    The distillation rows alone would drive w to the teacher that is easiest to imitate. So the rows see w detached,
    and it is trained by

        ``mean over the anchors' targets of -log sum_k w_k p_k(y)  -  entropy * mean H(w)``

    The anchors are the share `anchor_share` of the examples, the same ones in every epoch (by a hash of the example's
    number). The student learns from them too: it is the weights that must not be fitted to what they weigh, and the
    teachers have not seen these labels unless they were trained on the same data (then give them other data, or the
    weights reward what they have memorised). h(x) is the mean of the student's last hidden states, detached and
    layer-normalised. For a regression the teacher's likelihood is ``exp(-(y - t_k)^2)``.

    Options: `gate` none or pooled (one weight per example: not under ``per: token``); `anchor_share` 0 to 1; `entropy`
    in nats per nat, keeps w from collapsing; `lr`: peak learning rate of theta and W, on the stage's schedule. Weights
    start uniform.

    Source: Jacobs et al. 1991, Adaptive Mixtures of Local Experts (likelihood of the mixture, gate); Wolpert 1992,
    Stacked Generalization (weights fitted on a slice of their own).
    """

    def __init__(
        self, facts: StageFacts, gate: str = "none", anchor_share: float = 0.1, entropy: float = 0.01, lr: float = 0.05
    ) -> None:
        super().__init__()
        if gate not in _GATES:
            raise ValueError(f"gate must be one of {', '.join(_GATES)}; found {gate}")
        if not 0 < anchor_share <= 1:
            raise ValueError(
                f"anchor_share must be above 0, up to 1; found {anchor_share}: without anchors w collapses"
            )
        if entropy < 0:
            raise ValueError(f"entropy must not be negative; found {entropy}")
        if lr <= 0:
            raise ValueError(f"lr must be positive; found {lr}")
        self.anchor_share, self.entropy, self.lr = anchor_share, entropy, lr
        self.theta = nn.Parameter(torch.zeros(len(facts.teachers)))
        self.gate: nn.Parameter | None = None
        if gate == "pooled":  # here too, for a class that extends this one and sets the gate itself
            self.reads, self.per_token = frozenset({"pooled"}), False
            self.gate = nn.Parameter(torch.zeros(len(facts.teachers), facts.width))

    def forward(self, traits: Traits) -> Tensor:
        return self._log_weights(traits).detach().exp()[..., None].expand(traits.shape)

    def _log_weights(self, traits: Traits) -> Tensor:
        """[T,B]."""
        scores = self.theta[:, None].expand(-1, len(traits.mask))
        if self.gate is not None:
            scores = scores + self.gate @ gate_state(traits).to(self.gate.dtype).t()
        return torch.log_softmax(scores, 0)

    def counts(self, batch: Batch) -> Mapping[str, int]:
        return {"anchors": int(self._anchors(batch.on_host).sum())}

    def penalty(self, traits: Traits) -> Tensor:
        if traits.num_teachers == 1:  # nothing to learn; the gradient is zero, not missing
            return torch.stack([(0 * parameter).sum() for parameter in self.parameters()]).sum()
        log_weights, counts = self._log_weights(traits), traits.around.counts
        anchors = moved(self._anchors(traits.around.batch.on_host), traits.mask.device).float()
        of_target = log_weights if anchors.dim() == 1 else log_weights[..., None]
        likelihood = torch.logsumexp(of_target - traits.positions("ce"), 0)
        missed = -(likelihood * anchors).sum() / max(counts["anchors"], 1)
        entropy = -(log_weights.exp() * log_weights).sum(0)
        return missed - self.entropy * (entropy * traits.real).sum() / max(counts["sequences"], 1)

    def _anchors(self, batch: Batch) -> Tensor:
        """Targets of the held-out slice, shaped like the targets, of a batch on the host; fillers have none."""
        mask, chosen = batch.target_mask, torch.from_numpy(uniform("anchor", batch.keys.numpy()) < self.anchor_share)
        return mask & (chosen[:, None] if mask.dim() == 2 else chosen)
