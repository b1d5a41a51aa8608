"""Every registered weighting keeps every law; and every law catches a weighting made to break it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mtkd import LawBroken, check_weighting
from mtkd.weightings import Traits, Weighting
from mtkd.weightings.spec import WEIGHTINGS, WeightingSpec


@pytest.mark.parametrize("name", list(WEIGHTINGS))
def test_every_weighting_keeps_the_laws(name: str) -> None:
    """The laws hold for every registered weighting with its default options."""
    check_weighting(name)


def test_options_of_a_weighting() -> None:
    """The laws hold for the other options too."""
    check_weighting("mt_bert", lambda teachers: {"normalise": True})
    check_weighting(
        WeightingSpec("mt_bert", WEIGHTINGS["mt_bert"].cls, needs_labels=True), lambda t: {"normalise": True}
    )
    check_weighting("confidence", lambda teachers: {"tau": 0.01})
    check_weighting("uncertainty", lambda teachers: {"mode": "hard"})
    check_weighting("ae_kd", lambda teachers: {"c": 1.0})
    check_weighting("drop", lambda teachers: {"count": 2})
    check_weighting(
        "posterior", lambda teachers: {"beta": 1.0, "forget": 1.0, "prior": {n: 1.0 + (n == "t1") for n in teachers}}
    )
    for gate in ("none", "pooled"):
        check_weighting("learned", lambda teachers, gate=gate: {"gate": gate, "anchor_share": 1.0, "entropy": 0.5})
    check_weighting("fixed", lambda teachers: {"weights": {n: float(n == "t0") + 1e-3 for n in teachers}})


class BestTeacher(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(-traits.ce, 0)


class WithoutLastAxis(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return traits.full(1 / traits.num_teachers).squeeze(-1)


class PerExampleOnly(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return traits.full(1 / traits.num_teachers)[..., :1]


class InFloat64(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return traits.full(1 / traits.num_teachers).double()


class Overflowing(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        odds = traits.ce.exp()
        return odds / odds.sum(0)


class Negative(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        weights = traits.full(1.0) - traits.confidence
        return weights - weights.mean(0) + 1 / traits.num_teachers - 0.5 * (weights - weights.mean(0)).sign()


class Inverse(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return 1 / (1 + traits.entropy)


class NothingAlone(Weighting):
    """Meant as CA-MKD's (1 - softmax) / (K - 1), guarded against 0/0 in the wrong way."""

    def forward(self, traits: Traits) -> Tensor:
        return (1 - torch.softmax(traits.entropy, 0)) / max(traits.num_teachers - 1, 1)


class FirstIsBest(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        ranks = torch.arange(traits.num_teachers, 0, -1.0)
        return (ranks / ranks.sum())[:, None, None].expand(traits.shape)


class Attached(Weighting):
    def forward(self, traits: Traits) -> Tensor:
        return traits.full(1 / traits.num_teachers) + 0 * sum(x.values.sum() for x in traits.logits)


class Gated(Weighting):
    """Learned, but its gradient reaches the teachers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, traits: Traits) -> Tensor:
        logits = torch.stack([x.values.flatten(1).sum(1).reshape(-1)[0] for x in traits.logits])
        return torch.softmax(self.gate * logits.clamp(-1, 1), 0)[:, None, None].expand(traits.shape)


class Learned(Weighting):
    """Keeps every law: one number shared by the teachers, in the state."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.ones(1))

    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(self.sharpness * traits.confidence, 0)


class Forgetful(Weighting):
    """Counts its calls where no checkpoint sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, traits: Traits) -> Tensor:
        self.calls += 1
        return torch.softmax(traits.confidence * self.calls, 0)


class Drawn(Weighting):
    """A random number that is no buffer: another after each restart."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = torch.rand(1)

    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(traits.confidence * self.sharpness, 0)


class BatchMean(Weighting):
    """Depends on which examples share a micro-batch."""

    def forward(self, traits: Traits) -> Tensor:
        return torch.softmax(traits.confidence.mean(1, keepdim=True), 0).expand(traits.shape)


class OfTargetsAlone(Weighting):
    """Takes what stands where nothing was asked for a teacher's confidence."""

    def forward(self, traits: Traits) -> Tensor:
        there = traits.mask if traits.per == "token" and traits.mask.dim() == 2 else torch.ones_like(traits.mask)
        ranks = torch.tensor([0.0] * traits.num_teachers)[:, None, None] + traits.confidence
        return torch.softmax(ranks * (there if there.dim() == 2 and ranks.shape[-1] > 1 else 1), 0)


class WorstAtPrompts(Weighting):
    """Labels are read, and a position without one has weights of its own."""

    def forward(self, traits: Traits) -> Tensor:
        known = traits.mask if traits.shape[-1] > 1 else torch.ones(traits.shape[1:], dtype=torch.bool)
        return torch.softmax(torch.where(known, -traits.ce, traits.ce), 0)


class AddedOnce(Learned):
    """A constant for every micro-batch: twice as much in two of them."""

    def penalty(self, traits: Traits) -> Tensor:
        return self.sharpness.square().sum()


class Shared(Learned):
    """Keeps the law: a constant times the share, and a sum over examples divided by the step's count."""

    def penalty(self, traits: Traits) -> Tensor:
        return self.sharpness.square().sum() * traits.share + (
            (self.sharpness * traits.confidence).sum() / traits.around.counts["sequences"]
        )


class InfinitePenalty(Learned):
    def penalty(self, traits: Traits) -> Tensor:
        return self.sharpness.sum() * traits.share / 0


class AttachedPenalty(Learned):
    def penalty(self, traits: Traits) -> Tensor:
        return self.sharpness.sum() * traits.share + 0 * sum(x.values.sum() for x in traits.logits)


def test_a_penalty_may_be_a_share_of_the_steps() -> None:
    """A constant times the share adds up over micro-batches."""
    check_weighting(WeightingSpec("mine", Shared))


def test_labels_change_nothing_where_there_is_none() -> None:
    """A position without a label must not have weights of its own."""
    with pytest.raises(LawBroken, match="equal positions") as caught:
        check_weighting(WeightingSpec("mine", WorstAtPrompts, needs_labels=True))
    assert caught.value.law == "everywhere"


def test_learned_parameters_may_require_a_gradient() -> None:
    """A gradient of the weighting's own parameters breaks no law."""
    check_weighting(WeightingSpec("mine", Learned))


def test_labels_may_be_read_where_declared() -> None:
    """With `needs_labels` the weights may follow the labels."""
    check_weighting(WeightingSpec("mine", BestTeacher, needs_labels=True))


@pytest.mark.parametrize(
    ("law", "cls"),
    [
        ("shape", WithoutLastAxis),
        ("shape", PerExampleOnly),
        ("shape", InFloat64),
        ("finite", Overflowing),
        ("non-negative", Negative),
        ("sums to one", Inverse),
        ("one teacher", NothingAlone),
        ("order", FirstIsBest),
        ("labels", BestTeacher),
        ("detached", Attached),
        ("detached", Gated),
        ("state", Forgetful),
        ("state", Drawn),
        ("cut", BatchMean),
        ("everywhere", OfTargetsAlone),
        ("penalty", AddedOnce),
        ("finite", InfinitePenalty),
        ("detached", AttachedPenalty),
    ],
)
def test_each_law_can_fail(law: str, cls: type[Weighting]) -> None:
    """For each law there is a weighting that breaks it, and the law is named."""
    with pytest.raises(LawBroken) as caught:
        check_weighting(WeightingSpec("mine", cls))
    assert caught.value.law == law
    assert "'mine'" in str(caught.value)


def test_sum_of_one_is_asked_only_where_declared() -> None:
    """Without `sums_to_one` any sum passes."""
    check_weighting(WeightingSpec("mine", Inverse, sums_to_one=False))
