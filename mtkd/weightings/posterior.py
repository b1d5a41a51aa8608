"""Which teacher would have written this text: the weights follow from the tokens so far, without labels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtkd.weightings.base import Weighting
from mtkd.weightings.constant import given_shares
from mtkd.weightings.spec import among, weighting
from mtkd.weightings.traits import Traits


def faded_sums(values: Tensor, forget: float) -> Tensor:
    """``S(l) = forget S(l - 1) + values(l)`` along the last axis, any shape; in log2(L) steps instead of L.

    Step i adds the sum of the 2^i values before a position's own 2^i: ``A_2n(l) = A_n(l) + forget^n A_n(l - n)``.
    """
    sums, length, reach = values, values.shape[-1], 1
    while reach < length:
        earlier = torch.nn.functional.pad(sums[..., :-reach], (reach, 0))
        sums = sums + forget**reach * earlier
        reach *= 2
    return sums


@weighting("posterior", reads=among("token_log_probs"))
class Posterior(Weighting):
    """The Bayes posterior over the teachers given the text so far: ``w_k ∝ prior_k exp(beta S_k)``; causal-lm.

    At the position that predicts token t, with ``S_k(t) = forget S_k(t - 1) + log p_k(x_(t-1) | x_<(t-1))``: prompts
    count, the token that is predicted does not, so no label is read. An example begins with the prior: its first token
    is predicted by no teacher.

    ``beta: 1, forget: 1`` is exact Bayes for a text that one of the teachers wrote. Such a posterior is soon certain
    and stays so; `beta` below 1 trusts a token less, as tokens of a text are no independent evidence. `forget` below 1
    lets a text change its author: 0.95 looks back about 20 tokens. `prior`: weights by teacher name, default uniform.

    Under ``per: example`` it is the posterior after the prompt: at the first position with a target, or at the last
    token of an example without any.

    Source: ours, of known parts. Hoeting et al. 1999, Bayesian Model Averaging; Grünwald 2012, The Safe Bayesian (a
    power of the likelihood); Raftery et al. 2010, Online Prediction Under Model Uncertainty via Dynamic Model Averaging
    (forgetting as a power of the posterior).
    """

    after_prompt = True

    log_prior: Tensor

    def __init__(
        self,
        teachers: tuple[str, ...],
        beta: float = 0.5,
        forget: float = 0.95,
        prior: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if beta < 0:
            raise ValueError(
                f"beta must not be negative; found {beta}: the teacher that fits the text worst would count most"
            )
        if not 0 <= forget <= 1:
            raise ValueError(f"forget must be 0 to 1; found {forget}: 1 forgets nothing")
        self.beta, self.forget = beta, forget
        given = dict.fromkeys(teachers, 1.0) if prior is None else prior
        shares = given_shares(given, teachers, "weights of a prior", "@weighting.options.prior")
        self.register_buffer("log_prior", shares.double().log())

    def forward(self, traits: Traits) -> Tensor:
        if traits.num_teachers == 1:
            return traits.full(1.0)
        # float64: over some thousand tokens a sum of log-probabilities is large, and differences of it count.
        sums = faded_sums(traits.token_log_probs.double(), self.forget)  # [T,B,L]
        if traits.shape[-1] == 1:
            at = self._after_prompt(traits)[None, :, None].expand(len(sums), -1, 1)
            sums = sums.gather(-1, at)
        return torch.softmax(self.log_prior[:, None, None] + self.beta * sums, 0).float()

    @staticmethod
    def _after_prompt(traits: Traits) -> Tensor:
        """The position whose weights stand for its example, [B]."""
        asked, real = traits.mask, traits.around.batch.token_mask  # [B,L]
        places = torch.arange(asked.shape[1], device=asked.device)
        return torch.where(asked.any(-1), asked.int().argmax(-1), (places * real).argmax(-1))
