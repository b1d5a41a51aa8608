"""`policy_gradient`: its mean is reverse KL's gradient, by enumeration and by draws; the gate; the two advantages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.losses.distributions import reverse_kl
from mtkd.losses.spec import LOSSES
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses

SPEC = LOSSES["policy_gradient"]
WORDS = 7
GENERATOR = torch.Generator().manual_seed(0)
STUDENT, OLDER, *TEACHERS = torch.randn(4, WORDS, generator=GENERATOR, dtype=torch.float64)
WEIGHTS = (0.3, 0.7)
OPEN = {"gate": (0.0, 1e30)}


def exact_gradient(temperature: float = 1.0) -> Tensor:
    """Of ``sum_k w_k KL(p_S || p_k)`` over the whole vocabulary, [V]."""
    leaf = STUDENT.clone().requires_grad_()
    kls = [reverse_kl(leaf[None], t[None], torch.ones(1).bool(), temperature=temperature) for t in TEACHERS]
    (gradient,) = torch.autograd.grad(sum(w * kl.sum() for w, kl in zip(WEIGHTS, kls, strict=True)), leaf)
    return gradient


def gradients(tokens: Tensor, old: Tensor, **options: object) -> Tensor:
    """Of each written token's loss, [n,V]; `old`: logits of the student that wrote, at the options' temperature."""
    leaf = STUDENT.expand(len(tokens), -1).clone().requires_grad_()
    behaviour = torch.log_softmax(old / float(options.get("temperature", 1.0)), -1)[tokens]  # type: ignore[arg-type]
    every = torch.ones(len(tokens)).bool()
    losses = [
        SPEC.function(leaf, t.expand_as(leaf), every, labels=tokens, behaviour=behaviour, **options) for t in TEACHERS
    ]
    (gradient,) = torch.autograd.grad(sum(w * x.sum() for w, x in zip(WEIGHTS, losses, strict=True)), leaf)
    return gradient


def expected(old: Tensor, **options: object) -> Tensor:
    """The mean over all words, by their probability for the student that writes, [V]."""
    probs = torch.softmax(old / float(options.get("temperature", 1.0)), -1)  # type: ignore[arg-type]
    return probs @ gradients(torch.arange(WORDS), old, **options)


def test_the_mean_over_100000_draws_is_the_gradient_of_reverse_kl() -> None:
    """Law: within four standard errors in every column, of two weighted teachers."""
    tokens = torch.multinomial(torch.softmax(STUDENT, -1), 100_000, replacement=True, generator=GENERATOR)
    drawn = gradients(tokens, STUDENT)
    error = drawn.std(0) / len(drawn) ** 0.5
    gap = (drawn.mean(0) - exact_gradient()).abs()
    assert bool((gap < 4 * error).all())
    assert bool((exact_gradient().abs() > 8 * error).any())  # it could fail


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("old", [STUDENT, OLDER], ids=["its own", "an older student's"])
def test_its_mean_is_exact_whoever_wrote(old: Tensor, temperature: float) -> None:
    """Law: over all words, whatever distribution they are drawn from: the ratio corrects it (reuse)."""
    found = expected(old, temperature=temperature, **OPEN)
    torch.testing.assert_close(found, exact_gradient(temperature), rtol=1e-10, atol=1e-12)


def test_against_the_writer_the_distance_from_it_is_taken_away() -> None:
    """Law: the gradient of ``sum_k w_k KL(p_S || p_k) - KL(p_S || p_old)``; of reverse KL where p_old is p_S."""
    leaf = STUDENT.clone().requires_grad_()
    kl = reverse_kl(leaf[None], OLDER[None], torch.ones(1).bool()).sum()
    wanted = exact_gradient() - torch.autograd.grad(kl, leaf)[0]
    torch.testing.assert_close(expected(OLDER, against="writer", **OPEN), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(expected(STUDENT, against="writer"), exact_gradient(), rtol=1e-10, atol=1e-12)


def test_a_ratio_outside_the_gate_is_dropped() -> None:
    """Law: value and gradient are exactly 0 there, and those of no gate elsewhere; no ratio overflows."""
    ratios = torch.tensor([0.1, 0.3, 1.0, 4.0, 6.0, 1e-30, 1e30], dtype=torch.float64)
    tokens = torch.arange(WORDS)
    behaviour = torch.log_softmax(STUDENT, -1) - ratios.log()
    rows, every = STUDENT.expand(WORDS, -1), torch.ones(WORDS).bool()
    sides = []
    for gate in ({}, OPEN):
        leaf = rows.clone().requires_grad_()
        values = SPEC.function(leaf, TEACHERS[0].expand_as(leaf), every, labels=tokens, behaviour=behaviour, **gate)
        sides.append((values.detach(), torch.autograd.grad(values.sum(), leaf)[0]))
    inside = (ratios >= 0.2) & (ratios <= 5)
    for gated, whole in zip(*sides, strict=True):
        assert not gated[~inside].any()
        torch.testing.assert_close(gated[inside], whole[inside])
    advantage = torch.log_softmax(TEACHERS[0], -1) - torch.log_softmax(STUDENT, -1)
    torch.testing.assert_close(sides[0][0][inside], (-ratios * advantage)[inside])


def test_a_mixture_is_read_as_one_teacher() -> None:
    """Law: ``ensemble: probabilities`` has ``log sum_k w_k p_k(y)`` in the advantage."""
    match = Match(loss="policy_gradient", ensemble="probabilities")
    tokens, behaviour = torch.arange(WORDS), torch.log_softmax(STUDENT, -1)
    rows = [x.float().expand(WORDS, -1) for x in (STUDENT, *TEACHERS)]
    weights = torch.tensor(WEIGHTS)[:, None].expand(-1, WORDS)
    found = ensemble_losses(
        Row(match, SPEC, "x", (((0, 0),),) * 2), rows[0], rows[1:], weights, None, tokens, behaviour.float()
    )
    mixture = sum(w * torch.softmax(t, -1) for w, t in zip(WEIGHTS, TEACHERS, strict=True))
    torch.testing.assert_close(found.double(), behaviour - mixture.log(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"gate": (1.5, 5.0)},
        {"gate": (0.2, 0.5)},
        {"gate": (-0.1, 5.0)},
        {"gate": (1.0,)},
        {"gate": ["low", "high"]},
        {"against": "teacher"},
    ],
)
def test_options_without_a_meaning_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"gate|against"):
        SPEC(STUDENT[None], TEACHERS[0][None], None, options)
