"""Teachers chosen by a policy that is rewarded with how well the student does after the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mtkd.data.device import moved
from mtkd.weightings.base import StageFacts, Weighting
from mtkd.weightings.draws import uniform_of
from mtkd.weightings.learned import gate_state
from mtkd.weightings.spec import weighting
from mtkd.weightings.traits import Traits

_CREDITS = ("example", "batch")
_LARGEST = 30.0  # of a policy's score: its probability stays 1e-13 away from 0 and 1


def some_chosen(scores: Tensor, draws: Tensor) -> Tensor:
    """Actions of independent coins with probabilities ``sigmoid(score)``, given that not all of them fall on 0, [T,B].

    Exact, with one draw per coin: coin k, when all before it fell on 0, falls on 1 with probability
    ``sigmoid_k / (1 - prod_(j >= k) (1 - sigmoid_j))``.
    """
    log_off = nn.functional.logsigmoid(-scores)
    left = log_off.flip(0).cumsum(0).flip(0)  # log of "this one and all after it fall on 0"
    chances = torch.sigmoid(scores)
    actions = torch.zeros_like(scores, dtype=torch.bool)
    for k in range(len(scores)):
        none_yet = ~actions.any(0)
        chance = torch.where(none_yet, chances[k] / -torch.expm1(left[k]), chances[k])
        actions[k] = (draws[k] < chance) | (none_yet & (k == len(scores) - 1))
    return actions


@weighting("rl_kd", needs_labels=True, reads=("ce", "class_probabilities", "pooled", "student_loss"))
class RLKD(Weighting):
    """Each teacher is on or off per example, by a policy; those that are on share equally.

    ``pi(a_k = 1 | x) = sigmoid(A_k . s_k(x))`` with the state ``s_k = [log(1 + CE_k), p_k(classes), h(x), 1]``: the
    teacher's cross entropy, its class probabilities (left out for token tasks, where they would be as wide as the
    vocabulary), the student's pooled hidden state (layer-normalised, divided by its width). Never all teachers off: the
    coins are drawn given that one is on (`some_chosen`), and the gradient is that of this policy.

    Reward of example i: minus the student's loss on its label *after* the step that its teachers took part in, without
    dropout. Its baseline is minus the same loss before the step (nothing that the actions can change), plus m, a moving
    average of earlier steps' mean gain. With ``gain_i = loss_i(before) - loss_i(after)``

        ``credit: example``   ``grad = -mean_i (gain_i - m) grad log pi(a_i | s_i)``
        ``credit: batch``     ``grad = -(mean_i gain_i - m) mean_i grad log pi(a_i | s_i)``

    The first leaves out what an example's teachers do to the other examples. The second is the paper's one reward for
    all choices of a batch, and far noisier: of eight runs of the stress test (tests/weightings/specialists.py) the
    student was better than under uniform weights in four, with the first in all.

    The score ``grad log pi`` is taken before the step, with the parameters that drew the actions; the reward is known
    after it; so this gradient is kept in a buffer and enters the next step's loss as ``(A * buffer).sum()``: the same
    optimizer, clipping and checkpoint as everything else. Draws are a pure function of seed, step, example and teacher.

    The first step only sets m. Options: `credit`; `lr`: peak learning rate of A, on the stage's schedule; `decay` of m,
    per step. One choice per example: not under ``per: token``.

    Source: Yuan et al. 2021, Reinforced Multi-Teacher Selection for Knowledge Distillation, arXiv 2012.06048 (policy,
    state, reward by the student's loss). Baselines, credit per example, truncation and the delay by a step are ours.
    """

    per_token = False
    rewarded = True

    gradient: Tensor
    baseline: Tensor
    rewards: Tensor

    def __init__(self, facts: StageFacts, credit: str = "example", lr: float = 0.05, decay: float = 0.9) -> None:
        super().__init__()
        if credit not in _CREDITS:
            raise ValueError(f"credit must be one of {', '.join(_CREDITS)}; found {credit}")
        if lr <= 0:
            raise ValueError(f"lr must be positive; found {lr}")
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be at least 0 and below 1; found {decay}")
        self.credit, self.lr, self.decay = credit, lr, decay
        self._names, self._seed = facts.teachers, facts.seed
        self._order = sorted(range(len(facts.teachers)), key=facts.teachers.__getitem__)
        # Kept next to the parameter: ZeRO-3 empties the shape of the parameter itself.
        self.policy_shape = shape = (len(facts.teachers), 1 + facts.classes + facts.width + 1)
        self.policy = nn.Parameter(torch.zeros(shape))
        self.register_buffer("gradient", torch.zeros(shape))
        self.register_buffer("baseline", torch.zeros((), dtype=torch.float64))
        self.register_buffer("rewards", torch.zeros((), dtype=torch.int64))
        self._seen: list[tuple[Tensor, Tensor, Tensor]] = []  # labelled [B], scores [B,T,D], losses before the step [B]

    def forward(self, traits: Traits) -> Tensor:
        state = self._state(traits)
        with torch.no_grad():
            scores = self.scores(state)
            actions = self._actions(scores, traits)
            if self.training:
                labelled = traits.mask.any(-1) if traits.mask.dim() == 2 else traits.mask
                score = self._score(scores, actions, state * labelled[None, :, None])
                self._seen.append((labelled, score, traits.student_loss))
            return (actions / actions.sum(0)).float()[..., None]

    def _state(self, traits: Traits) -> Tensor:
        """[T,B,D] float64."""
        count = traits.num_teachers
        pooled = gate_state(traits).expand(count, -1, -1)
        ones = torch.ones_like(pooled[..., :1])
        parts = [traits.ce.log1p(), traits.class_probabilities, pooled, ones]
        return torch.cat([part.double() for part in parts], -1)

    def scores(self, state: Tensor) -> Tensor:
        """The policy's scores, before the sigmoid, [T,B]."""
        return (self.policy.double()[:, None] * state).sum(-1).clamp(-_LARGEST, _LARGEST)

    def _actions(self, scores: Tensor, traits: Traits) -> Tensor:
        """0 or 1, [T,B] float64; coins are thrown in the order of the teachers' names."""
        around = traits.around
        draws = uniform_of(self._names, self._seed, around.step, around.batch.on_host.keys.numpy())[self._order]
        ordered = torch.stack([scores[k] for k in self._order])
        thrown = some_chosen(ordered, moved(torch.from_numpy(draws), scores.device)).double()
        return torch.stack([thrown[self._order.index(k)] for k in range(len(scores))])

    def _score(self, scores: Tensor, actions: Tensor, state: Tensor) -> Tensor:
        """``grad_A log pi(a_i | s_i)`` of every example, [B,T,D] float64."""
        on = torch.sigmoid(scores) / -torch.expm1(-nn.functional.softplus(scores).sum(0))  # P(a_k = 1)
        return (((actions - on) * (scores.abs() < _LARGEST))[..., None] * state).transpose(0, 1)

    def judged(self, losses: Sequence[Tensor]) -> Tensor:
        """[number of examples, sum of gains, sum of scores, sum of gains times scores], flat, float64."""
        labelled, score, before = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        gains = before.double() - torch.cat(list(losses)).double()
        self._seen = []
        parts = [labelled.sum(), gains.sum(), score.sum(0), torch.einsum("b,btd->td", gains, score)]
        return torch.cat([part.reshape(-1).double() for part in parts])

    def reward(self, total: Tensor) -> None:
        count, gains = total[0].clamp_min(1), total[1]  # never numbers of the host, which would wait for them
        score, gained = total[2:].reshape(2, *self.policy_shape)
        mean = gains / count
        usual = torch.where(self.rewards > 0, self.baseline, mean)
        weighted = gained - usual * score if self.credit == "example" else (mean - usual) * score
        # The first step has nothing to compare with: the buffer stays 0.
        self.gradient.copy_(-weighted / count * (self.rewards > 0))
        self.baseline.copy_(self.decay * usual + (1 - self.decay) * mean)
        self.rewards.add_(1)

    def penalty(self, traits: Traits) -> Tensor:
        return (self.policy * self.gradient).sum() * traits.share
