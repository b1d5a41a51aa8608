"""How several teachers meet in a logits row, against plain loops over positions and teachers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.losses.spec import LOSSES
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses

POSITIONS, COLUMNS = 6, 8
MASK = torch.arange(POSITIONS) != 4


def row(loss: str = "kl", **match: object) -> Row:
    return Row(Match(loss=loss, **match), LOSSES[loss], "0:logits", (((0, 0),),) * 3)


def problem(num_teachers: int, seed: int = 0) -> tuple[Tensor, list[Tensor], Tensor]:
    """(student, teachers, un-normalised weights)."""
    generator = torch.Generator().manual_seed(seed)
    student = 2 * torch.randn(POSITIONS, COLUMNS, generator=generator)
    teachers = list(3 * torch.randn(num_teachers, POSITIONS, COLUMNS, generator=generator))
    return student, teachers, 0.1 + torch.rand(num_teachers, POSITIONS, generator=generator)


def divergence(loss: str, q: np.ndarray, p: np.ndarray) -> float:
    """Of one position; p the teacher's, q the student's probabilities."""
    m = (p + q) / 2
    return {
        "kl": scipy.special.rel_entr(p, q).sum(),
        "soft_ce": -(p * np.log(q)).sum(),
        "reverse_kl": scipy.special.rel_entr(q, p).sum(),
        "jsd": scipy.special.rel_entr(p, m).sum() / 2 + scipy.special.rel_entr(q, m).sum() / 2,
    }[loss]


def by_loops(loss: str, ensemble: str, temperature: float, data: tuple[Tensor, list[Tensor], Tensor]) -> list[float]:
    student, teachers, weights = data
    out = []
    for i in range(POSITIONS):
        q = scipy.special.softmax(student[i].double().numpy() / temperature)
        logits = [t[i].double().numpy() for t in teachers]
        p = [scipy.special.softmax(x / temperature) for x in logits]
        w = weights[:, i].double().numpy()
        if ensemble == "losses":
            value = sum(w[k] * divergence(loss, q, p[k]) for k in range(len(w)))
        elif ensemble == "probabilities":
            value = w.sum() * divergence(loss, q, sum(w[k] * p[k] for k in range(len(w))) / w.sum())
        else:
            mean = sum(w[k] * logits[k] for k in range(len(w))) / w.sum()
            value = w.sum() * divergence(loss, q, scipy.special.softmax(mean / temperature))
        out.append(temperature**2 * value * bool(MASK[i]))
    return out


@pytest.mark.parametrize("loss", ["kl", "soft_ce", "reverse_kl", "jsd"])
@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
@pytest.mark.parametrize(("num_teachers", "temperature"), [(1, 2.0), (2, 1.0), (3, 1.0), (3, 3.0)])
def test_against_loops(loss: str, ensemble: str, num_teachers: int, temperature: float) -> None:
    """Every ensemble of every divergence is the formula computed position by position with scipy."""
    data = problem(num_teachers)
    found = ensemble_losses(row(loss, ensemble=ensemble, options={"temperature": temperature}), *data, MASK)
    wanted = torch.tensor(by_loops(loss, ensemble, temperature, data), dtype=torch.float32)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=1e-5)


def test_the_three_ways_to_meet_are_three_different_things() -> None:
    """Losses, probabilities and logits give values that differ: each comparison below can fail."""
    found = [ensemble_losses(row(ensemble=e), *problem(2), MASK) for e in ("losses", "probabilities", "logits")]
    for a, b in itertools.combinations(found, 2):
        assert float((a - b)[MASK].abs().min()) > 1e-3


@pytest.mark.parametrize("loss", ["kl", "soft_ce"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_mixture_is_the_plain_sum_in_value_and_gradient(loss: str, temperature: float) -> None:
    """For kl and soft_ce the teachers are mixed first; that is the weighted sum of their losses."""
    student, teachers, weights = problem(3)
    options = {"temperature": temperature}
    student.requires_grad_()
    found = ensemble_losses(row(loss, options=options), student, teachers, weights, MASK)
    plain = sum(w * LOSSES[loss](student, t, MASK, options) for w, t in zip(weights, teachers, strict=True))
    assert isinstance(plain, Tensor)
    ours, theirs = (torch.autograd.grad(x.sum(), student)[0] for x in (found, plain))
    scale = float(plain.detach().abs().max())
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5 * scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def test_the_mixture_looks_at_the_student_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where the student's softmax is taken: once for any number of teachers, once per teacher otherwise."""
    calls, plain = 0, torch.log_softmax

    def counted(logits: Tensor, *rest: int) -> Tensor:
        nonlocal calls
        calls += logits.requires_grad
        return plain(logits, *rest)

    monkeypatch.setattr(torch, "log_softmax", counted)
    for loss, wanted in (("kl", 1), ("soft_ce", 1), ("reverse_kl", 3)):
        calls = 0
        student, teachers, weights = problem(3)
        ensemble_losses(row(loss), student.requires_grad_(), teachers, weights, MASK)
        assert calls == wanted


@pytest.mark.parametrize("extreme", [100.0, 1e4])
def test_the_mixture_of_teachers_who_are_sure_of_different_things(extreme: float) -> None:
    """Of two sure teachers and a uniform student: log 3, the gradient the mean of both; nothing overflows."""
    student = torch.zeros(1, 3, requires_grad=True)
    teachers = [torch.tensor([[extreme, 0.0, 0.0]]), torch.tensor([[0.0, extreme, 0.0]])]
    found = ensemble_losses(row(), student, teachers, torch.full((2, 1), 0.5), torch.ones(1, dtype=torch.bool))
    assert float(found) == pytest.approx(np.log(3), rel=1e-5)  # each alone: log 3 - 0
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient[0].tolist() == pytest.approx([1 / 3 - 0.5, 1 / 3 - 0.5, 1 / 3], abs=1e-5)


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_one_teacher_is_the_single_path_bit_by_bit(loss: str, ensemble: str) -> None:
    """T = 1 gives the plain loss."""
    student, teachers, _ = problem(1)
    found = ensemble_losses(row(loss, ensemble=ensemble), student, teachers, torch.ones(1, POSITIONS), MASK)
    assert torch.equal(found, LOSSES[loss](student, teachers[0], MASK))


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
@pytest.mark.parametrize("loss", ["kl", "reverse_kl"])
def test_a_teacher_twice_is_the_teacher_once(loss: str, ensemble: str) -> None:
    """Two equal teachers of half the weight are one."""
    student, teachers, _ = problem(1)
    halves = torch.full((2, POSITIONS), 0.5)
    found = ensemble_losses(row(loss, ensemble=ensemble), student, teachers * 2, halves, MASK)
    torch.testing.assert_close(found, LOSSES[loss](student, teachers[0], MASK), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_the_order_of_teachers_is_irrelevant(loss: str, ensemble: str) -> None:
    """A sum over teachers has no order."""
    student, teachers, weights = problem(3)
    wanted = ensemble_losses(row(loss, ensemble=ensemble), student, teachers, weights, MASK)
    for order in itertools.permutations(range(3)):
        held = [teachers[k] for k in order]
        found = ensemble_losses(row(loss, ensemble=ensemble), student, held, weights[list(order)], MASK)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "jsd"])
@pytest.mark.parametrize("num_teachers", [1, 3])
def test_the_gradient_of_a_weight_is_its_teachers_loss(loss: str, num_teachers: int) -> None:
    """The loss is linear in the weights."""
    student, teachers, weights = problem(num_teachers)
    weights.requires_grad_()
    values = ensemble_losses(row(loss), student, teachers, weights, MASK)
    (found,) = torch.autograd.grad(values.sum(), weights)
    for k in range(num_teachers):
        torch.testing.assert_close(found[k], LOSSES[loss](student, teachers[k], MASK))
    plain = ensemble_losses(row(loss), student, teachers, weights.detach(), MASK)
    torch.testing.assert_close(values.detach(), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
def test_learned_weights_get_a_gradient_in_every_ensemble(ensemble: str) -> None:
    """It is the finite difference of the loss by the weight."""
    student, teachers, weights = problem(2)
    weights = weights.double().requires_grad_()

    def values(weights: Tensor) -> Tensor:
        held = row("reverse_kl", ensemble=ensemble)
        return ensemble_losses(held, student, teachers, weights.float(), MASK).double()

    (found,) = torch.autograd.grad(values(weights).sum(), weights)
    step = 1e-2
    for k, i in ((0, 0), (1, 3)):
        bump = torch.zeros_like(weights)
        bump[k, i] = step
        numeric = float((values(weights + bump) - values(weights - bump)).sum().detach()) / (2 * step)
        assert float(found[k, i]) == pytest.approx(numeric, rel=2e-2, abs=1e-3)


def test_a_row_that_is_not_weighted_sums_over_teachers() -> None:
    """`weighted: false` is weight 1 for each."""
    student, teachers, weights = problem(3)
    found = ensemble_losses(row(weighted=False), student, teachers, weights, MASK)
    wanted = sum(LOSSES["kl"](student, t, MASK) for t in teachers)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_masked_positions_may_hold_anything(loss: str, ensemble: str) -> None:
    """NaN and infinity there change no value and no gradient, bit by bit."""
    student, teachers, weights = problem(2)
    results = []
    for garbage in (0.0, torch.nan, torch.inf):
        spoiled = [x.masked_fill(~MASK[:, None], garbage) for x in (student, *teachers)]
        spoiled[0].requires_grad_()
        values = ensemble_losses(row(loss, ensemble=ensemble), spoiled[0], spoiled[1:], weights, MASK)
        results.append((values.detach(), torch.autograd.grad(values.sum(), spoiled[0])[0]))
    for values, gradient in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert not bool(results[0][0][~MASK].any())


def test_teachers_without_any_weight_give_nothing() -> None:
    """Weights of 0 give a loss of 0 and no NaN."""
    student, teachers, weights = problem(2)
    student.requires_grad_()
    for ensemble in ("losses", "probabilities", "logits"):
        values = ensemble_losses(row(ensemble=ensemble), student, teachers, 0 * weights, MASK)
        (gradient,) = torch.autograd.grad(values.sum(), student)
        assert float(values.detach().abs().max()) == 0
        assert float(gradient.abs().max()) == 0
