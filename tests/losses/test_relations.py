"""DKD, DIST and standardised logits: what the formulas promise beyond their value, targets, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL
from mtkd.errors import UserError
from mtkd.losses.spec import LOSSES, loss
from mtkd.models.info import ModelInfo
from mtkd.objective.compile import Row, compile_rows
from mtkd.objective.ensembles import ensemble_losses
from mtkd.objective.kept import check_cached_row


def rand(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(name: str, student: Tensor, teacher: Tensor, **named: object) -> Tensor:
    return LOSSES[name].function(student, teacher, torch.ones(len(student), dtype=torch.bool), **named)


def by_loop(student: Tensor, teacher: Tensor, targets: list[int], alpha: float, beta: float, t: float) -> list[float]:
    values = []
    for s, z, y in zip(student.numpy() / t, teacher.numpy() / t, targets, strict=True):
        q, p = scipy.special.softmax(s), scipy.special.softmax(z)
        against = scipy.special.rel_entr([p[y], 1 - p[y]], [q[y], 1 - q[y]]).sum()
        among = scipy.special.rel_entr(*(np.delete(x, y) / np.delete(x, y).sum() for x in (p, q))).sum()
        values.append(t**2 * (alpha * against + beta * among))
    return values


@pytest.mark.parametrize(("alpha", "beta", "temperature"), [(1.0, 8.0, 4.0), (0.0, 1.0, 1.0), (2.0, 0.0, 0.5)])
def test_dkd_against_a_loop(alpha: float, beta: float, temperature: float) -> None:
    """At labels where there are some, at the teacher's choice elsewhere."""
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    choice = teacher.argmax(-1).tolist()
    given = [(choice[0] + 1) % 6, NO_LABEL, (choice[2] + 2) % 6, NO_LABEL]
    options = {"alpha": alpha, "beta": beta, "temperature": temperature}
    targets = [c if g == NO_LABEL else g for c, g in zip(choice, given, strict=True)]
    for labels, wanted in ((torch.tensor(given), targets), (None, choice)):
        found = run("dkd", student, teacher, labels=labels, **options)
        torch.testing.assert_close(
            found, torch.tensor(by_loop(student, teacher, wanted, alpha, beta, temperature)).double()
        )
    assert (
        float((run("dkd", student, teacher, labels=torch.tensor(given)) - run("dkd", student, teacher)).abs().max())
        > 0.01
    )


def test_kl_is_dkd_with_the_teachers_doubt_as_beta() -> None:
    """The paper's equation 6: KD = TCKD + (1 - p_T(t)) NCKD."""
    student, teacher = rand(5, 7), rand(5, 7, seed=1)
    labels = torch.tensor([3, 0, 6, 2, 2])
    doubt = 1 - torch.softmax(teacher, -1).gather(-1, labels[:, None])[:, 0]
    parts = [run("dkd", student, teacher, labels=labels, alpha=a, beta=1.0 - a) for a in (1.0, 0.0)]
    torch.testing.assert_close(parts[0] + doubt * parts[1], run("kl", student, teacher))


def test_labels_at_positions_that_do_not_count_are_not_read() -> None:
    """Whatever stands there: the index would be outside of the columns."""
    student, teacher, mask = rand(3, 5).float(), rand(3, 5, seed=1).float(), torch.tensor([True, False, True])
    values = [
        LOSSES["dkd"](student, teacher, mask, labels=torch.tensor([1, other, 2])) for other in (0, 4, 10**9, NO_LABEL)
    ]
    assert all(torch.equal(values[0], other) for other in values[1:])
    assert not torch.equal(values[0], LOSSES["dkd"](student, teacher, mask, labels=torch.tensor([1, 0, 3])))


def test_labels_are_no_option() -> None:
    assert "labels" not in LOSSES["dkd"].options()
    with pytest.raises(UserError, match="unknown option"):
        compile_rows(
            [Match(loss="dkd", options={"labels": 1})], info(5), {"t": info(5)}, token_level=False, regression=False
        )


@pytest.mark.parametrize("name", ["dist_inter", "dist_intra"])
def test_dist_ignores_shift_and_scale_of_probabilities(name: str) -> None:
    """A student whose probabilities are half way to uniform correlates by 1: value 0, where `kl` is far from it."""
    teacher = rand(6, 5, seed=1)
    student = (0.5 * torch.softmax(teacher, -1) + 0.1).log()
    assert float(run(name, student, teacher).abs().max()) < 1e-9
    assert float(run("kl", student, teacher).min()) > 1e-3


def test_the_intra_class_term_is_that_of_the_micro_batch() -> None:
    """Every example has the value of its micro-batch, without rows that do not count; of one there is no slope."""
    student, teacher = rand(6, 5), rand(6, 5, seed=1)
    mask = torch.tensor([True, True, False, True, False, True])
    p, q = (torch.softmax(x[mask], -1).numpy() for x in (teacher, student))
    wanted = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(5)])
    found = LOSSES["dist_intra"].function(student, teacher, mask)
    torch.testing.assert_close(found, torch.full_like(found, wanted))
    halves = torch.cat([run("dist_intra", student[half], teacher[half]) for half in (slice(3), slice(3, None))])
    assert float((halves - run("dist_intra", student, teacher)).abs().max()) > 0.01
    lone = student[:1].clone().requires_grad_()
    value = run("dist_intra", lone, teacher[:1])
    assert not bool(torch.autograd.grad(value.sum(), lone)[0].any())


def test_standardised_logits_ignore_the_size_of_either_side() -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    for name in ("kl", "reverse_kl", "jsd", "adaptive_kl", "dkd"):
        found = run(name, 0.01 * student + 5, 30 * teacher - 2, standardise=True, temperature=2.0)
        torch.testing.assert_close(
            found, run(name, student, teacher, standardise=True, temperature=2.0), rtol=1e-4, atol=1e-5
        )
        assert float((found - run(name, student, teacher, temperature=2.0)).abs().max()) > 0.01


def test_flat_rows_have_no_slope_that_is_not_finite() -> None:
    """A head that starts at 0 gives equal logits: z-scores of them have no derivative."""
    flat = torch.zeros(2, 4, requires_grad=True)
    value = LOSSES["kl"](flat, rand(2, 4).float(), standardise=True)
    assert bool(torch.autograd.grad(value.sum(), flat)[0].isfinite().all())


@pytest.mark.parametrize("ensemble", ["losses", "probabilities", "logits"])
def test_every_teacher_is_standardised_by_itself(ensemble: str) -> None:
    """A teacher that is ten times as loud counts as before, in every ensemble; their order does not matter."""
    row = Row(Match(ensemble=ensemble, options={"standardise": True}), LOSSES["kl"], "0:logits", (((0, 0),),) * 2)
    student, *teachers = (rand(5, 6, seed=i).float() for i in range(3))
    weights, mask = torch.tensor([[0.3] * 5, [0.7] * 5]), torch.arange(5) != 2
    first = ensemble_losses(row, student.index_fill(0, torch.tensor([2]), torch.nan), teachers, weights, mask)
    louder = ensemble_losses(row, student, [10 * teachers[0] + 3, teachers[1]], weights, mask)
    turned = ensemble_losses(row, student, teachers[::-1], weights.flip(0), mask)
    for other in (louder, turned):
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-5)
    plain = Row(Match(ensemble=ensemble), LOSSES["kl"], "0:logits", (((0, 0),),) * 2)
    quiet, loud = (
        ensemble_losses(plain, student, [factor * teachers[0], teachers[1]], weights, mask) for factor in (1, 10)
    )
    assert float((quiet - loud).abs().max()) > 0.01


def info(classes: int) -> ModelInfo:
    return ModelInfo("bert", 2, 8, 2, 2, 4, 11, classes, 32, False, frozenset({"logits", "nsp_logits"}))


def test_rows_that_a_task_cannot_have_are_refused() -> None:
    sides = info(2), {"t": info(2)}
    asked = Match(loss="kl", options={"standardise": True})
    with pytest.raises(UserError, match="two classes are 1 and -1"):
        compile_rows([asked], *sides, token_level=False, regression=False)
    with pytest.raises(UserError, match="two classes are 1 and -1"):
        compile_rows([asked.model_copy(update={"feature": "nsp_logits"})], *sides, token_level=True, regression=False)
    assert compile_rows([asked], *sides, token_level=True, regression=False)
    with pytest.raises(UserError, match=r"match\[0\].loss: .*tokens, which come in tiles"):
        compile_rows([Match(loss="dist_intra")], *sides, token_level=True, regression=False)
    for options in ({"alpha": -1.0}, {"beta": -0.5}):
        with pytest.raises(UserError, match="is a weight, 0 or more"):
            compile_rows([Match(loss="dkd", options=options)], *sides, token_level=False, regression=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dkd", {}), ("dist_inter", {}), ("kl", {"standardise": True}), ("soft_ce", {"standardise": True})],
)
def test_a_cache_of_a_few_columns_per_token_is_refused_and_whole_classes_are_not(
    name: str, options: dict[str, object]
) -> None:
    row = Row(Match(loss=name, options=options), LOSSES[name], "0:logits", (((0, 0),),))
    check_cached_row(row, "classes", 0, 1.0, "match[0]")
    for kind in ("top", "sampled"):
        with pytest.raises(UserError, match=r"match\[0\]: .*every column"):
            check_cached_row(row, kind, 8, 1.0, "match[0]")


def test_a_need_that_does_not_exist_is_refused_where_the_loss_is_registered() -> None:
    with pytest.raises(ValueError, match="needs"):
        loss("of-a-typo", needs=("label",))(lambda student, teacher, mask: student)
