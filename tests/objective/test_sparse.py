"""Cached teachers in the logits rows, against divergences of k + 1 outcomes written out and against whole rows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.batch import Batch
from mtkd.errors import DataError, UserError
from mtkd.losses.spec import LOSSES, LossSpec
from mtkd.models.features import DenseLogits, HeadLogits, Logits, SparseLogits, SparseRows
from mtkd.models.pieces import EVERY_PIECE
from mtkd.objective.compile import Row
from mtkd.objective.ensembles import ensemble_losses
from mtkd.objective.kept import check_cached_row, check_cached_rows, check_known, completed, densify
from mtkd.objective.onepass import ReadOnce
from mtkd.objective.targets import passes_for, positions_of
from mtkd.objective.tiles import tiled
from mtkd.pool.cache import CacheContent
from mtkd.pool.cache.codec import FLOOR, SampledCodec
from mtkd.pool.cache.records import _sampled
from mtkd.weightings.traits import TRAITS, Around, Traits

POSITIONS, COLUMNS, KEPT = 7, 30, 5


def draw(seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(POSITIONS, COLUMNS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(logits: Tensor, k: int = KEPT, temperature: float = 1.0) -> SparseRows:
    log_probs = (logits / temperature).log_softmax(-1)
    kept, ids = log_probs.topk(k, -1)
    return SparseRows(ids, kept, log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1).clamp_min(-100), temperature)


def row(loss: str, num_teachers: int = 1, **match: object) -> Row:
    return Row(Match(loss=loss, **match), LOSSES[loss], f"0:{loss}", (((0, 0),),) * num_teachers)


def cached(rows: SparseRows, name: str = "t") -> SparseLogits:
    single = SparseRows(
        rows.ids, rows.log_probs.float(), None if rows.tail is None else rows.tail.float(), rows.temperature
    )
    return SparseLogits(name, torch.arange(POSITIONS), single, COLUMNS, {})


def outcomes(log_probs: Tensor, ids: Tensor) -> Tensor:
    """[n,V] -> [n,k+1]: the kept columns and all others as one."""
    others = torch.ones_like(log_probs).scatter(-1, ids, 0)
    return torch.cat([log_probs.exp().gather(-1, ids), (log_probs.exp() * others).sum(-1, keepdim=True)], -1)


def divergence(loss: str, p: Tensor, q: Tensor) -> Tensor:
    """Written out, of the teacher's p and the student's q."""
    m = (p + q) / 2
    values = {
        "kl": p * (p / q).log(),
        "reverse_kl": q * (q / p).log(),
        "jsd": (p * (p / m).log() + q * (q / m).log()) / 2,
    }
    return values[loss].sum(-1)


@pytest.mark.parametrize("loss", ["kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_completed_divergences_are_those_of_k_plus_one_outcomes(loss: str, temperature: float) -> None:
    """A cached teacher is its k columns and one tail: value and gradient of the formula over k + 1 outcomes."""
    student, teacher = draw(0).requires_grad_(), sparse(draw(1), temperature=temperature)
    assert teacher.tail is not None
    values = LOSSES[loss].function(student, densify(teacher, student), None, temperature=temperature)
    p = torch.cat([teacher.log_probs.exp(), teacher.tail.exp()[:, None]], -1)
    wanted = temperature**2 * divergence(loss, p, outcomes((student / temperature).log_softmax(-1), teacher.ids))
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-9)
    (found,), (exact,) = (torch.autograd.grad(x.sum(), student, retain_graph=True) for x in (values, wanted))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def test_reverse_kl_of_a_cached_teacher_is_not_negative_and_least_at_the_teacher() -> None:
    """Without the tail a student could lower it by moving mass outside the kept columns."""
    logits = draw(3)
    teacher = sparse(logits)
    student = draw(4).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.1)
    for _ in range(400):
        value = LOSSES["reverse_kl"].function(student, densify(teacher, student), None)
        assert bool((value > -1e-12).all())
        optimizer.zero_grad()
        value.sum().backward()
        optimizer.step()
    assert float(value.max()) < 1e-4
    exact = outcomes(logits.log_softmax(-1), teacher.ids)
    torch.testing.assert_close(outcomes(student.log_softmax(-1), teacher.ids), exact, rtol=0, atol=5e-3)


def test_all_columns_kept_is_the_teacher_itself() -> None:
    logits = draw(5).float()
    whole = densify(sparse(logits, COLUMNS), draw(6).float())
    torch.testing.assert_close(whole.log_softmax(-1), logits.log_softmax(-1))
    for loss in ("kl", "jsd", "reverse_kl"):
        found = LOSSES[loss](draw(6).float(), whole, None)
        torch.testing.assert_close(found, LOSSES[loss](draw(6).float(), logits, None))


@pytest.mark.parametrize("count", [2, KEPT])
def test_top_keeps_fewer_columns_of_the_cache(count: int) -> None:
    logits, student = draw(7).float(), draw(8).float()
    asked = row("kl", options={"top": count})
    whole, options = completed(asked, student, sparse(logits))
    found = asked.spec(student, whole, None, options)
    torch.testing.assert_close(found, asked.spec(student, logits, None, {"top": count}))


def serving(
    rows: Sequence[Row], teachers: Sequence[Logits], student: Tensor, weights: Tensor, labels: Tensor
) -> list[Tensor]:
    """Losses of the rows as the objective forms them, in tiles of 3."""
    index = torch.arange(POSITIONS)
    once = ReadOnce(rows, teachers, index, labels)
    parts = []
    for start in range(0, POSITIONS, 3):
        at = slice(start, min(start + 3, POSITIONS))
        tile = once.at(student[at], at)
        assert tile is not None
        found = [tile.losses(r, weights[:, at]) for r in rows]
        parts.append([x for x in found if x is not None])
    assert all(len(part) == len(rows) for part in parts), "a row was not served"
    return [torch.cat(part) for part in zip(*parts, strict=True)]


@pytest.mark.parametrize(("loss", "scale"), [*itertools.product(["kl", "soft_ce"], [True, False])])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kept", [(5, 5, 5), (5, 3, 8), (COLUMNS, 1, 2)])
def test_one_pass_equals_completed_rows_and_the_formula(
    loss: str, scale: bool, temperature: float, kept: tuple[int, ...]
) -> None:
    """Values, the student's gradient and the weights'."""
    student, drawn = draw(10).float().requires_grad_(), torch.Generator().manual_seed(12)
    weights = torch.rand(3, POSITIONS, generator=drawn).add(0.1).requires_grad_()
    teachers = [sparse(draw(11 + i).float(), k, temperature) for i, k in enumerate(kept)]
    options = {"temperature": temperature, "scale": scale}
    rows = [row(loss, 3, options=options), *([row("ce", target="labels")] if temperature == 1 else [])]
    labels = torch.arange(POSITIONS) * 3
    found = serving(rows, [cached(t) for t in teachers], student, weights, labels)
    wanted = [ensemble_losses(rows[0], student, teachers, weights, None)]
    if temperature == 1:
        wanted.append(torch.nn.functional.cross_entropy(student, labels, reduction="none"))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    leaves = (student, weights)
    gradients = [torch.autograd.grad(torch.stack(x).sum(0).square().sum(), leaves) for x in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        largest = max(1.0, float(theirs.abs().max()))  # entries near 0 are differences of such numbers
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5 * largest)
    if loss == "kl":
        total = torch.zeros(POSITIONS, dtype=torch.float64)
        log_s = (student.detach().double() / temperature).log_softmax(-1)
        for t, w in zip(teachers, weights.detach().double(), strict=True):
            assert t.tail is not None
            p = torch.cat([t.log_probs.exp(), t.tail.exp()[:, None]], -1).double()
            q = outcomes(log_s, t.ids)
            total += w * (torch.special.xlogy(p, p) - torch.special.xlogy(p, q.clamp_min(1e-300))).sum(-1)
        factor = temperature**2 if scale else 1
        torch.testing.assert_close(found[0].double(), factor * total, rtol=1e-5, atol=1e-5)


def test_a_student_that_is_surer_than_the_teacher_keeps_the_gradient_of_the_tail() -> None:
    """Its mass outside, 1e-9, is no difference of float32 numbers."""
    teacher = sparse(draw(20, 1.0))
    student = torch.full((POSITIONS, COLUMNS), -25.0, dtype=torch.float64).scatter(-1, teacher.ids, 0.0)
    student = (student + 0.1 * draw(21)).requires_grad_()
    assert teacher.tail is not None
    p = torch.cat([teacher.log_probs.exp(), teacher.tail.exp()[:, None]], -1)
    wanted = divergence("kl", p, outcomes(student.log_softmax(-1), teacher.ids))
    (exact,) = torch.autograd.grad(wanted.sum(), student)
    single = student.detach().float().requires_grad_()
    (found,) = serving([row("kl")], [cached(teacher)], single, torch.ones(1, POSITIONS), torch.zeros(POSITIONS).long())
    (gradient,) = torch.autograd.grad(found.sum(), single)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("loss", ["kl", "soft_ce"])
@pytest.mark.parametrize("surer", [4.0, 12.0, 16.0, 24.0, 40.0, 80.0, 120.0])
def test_values_of_a_sure_student_are_those_in_float64(loss: str, surer: float) -> None:
    """Its mass outside the kept columns falls from a half to less than the smallest float32."""
    teacher, student = sparse(draw(22, 1.0)), 0.3 * draw(23)
    student = student.scatter_add(-1, teacher.ids, torch.full_like(teacher.log_probs, surer))
    log_s = student.log_softmax(-1)
    p = densify(teacher, student).softmax(-1)
    wanted = -(p * log_s).sum(-1)
    if loss == "kl":
        wanted = wanted + (p * p.log()).sum(-1)
    ones, labels = torch.ones(1, POSITIONS), torch.zeros(POSITIONS).long()
    (found,) = serving([row(loss)], [cached(teacher)], student.float(), ones, labels)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


def test_unused_places_of_drawn_targets_count_nothing() -> None:
    """They repeat id 0, which the student holds for probable here."""
    student = draw(24)
    student[:, 0] += 6
    log_p = draw(25).log_softmax(-1)
    ids = torch.cat([torch.full((POSITIONS, 1), 4), torch.zeros(POSITIONS, 40).long()], -1)
    known = torch.full(ids.shape, FLOOR).masked_fill(ids == 4, 0.0)
    entropy = -(log_p.exp() * log_p).sum(-1).float()
    teacher = SparseLogits("t", torch.arange(POSITIONS), SparseRows(ids, known, None, 1.0, entropy), COLUMNS, {})
    found = serving([row("soft_ce")], [teacher], student.float(), torch.ones(1, 7), torch.zeros(7).long())[0]
    torch.testing.assert_close(found.double(), -student.log_softmax(-1)[:, 4], rtol=1e-5, atol=1e-5)


def test_the_pass_has_the_gradient_of_finite_differences() -> None:
    """Of cross entropies and labels in one pass; torch's gradcheck in float64."""
    from mtkd.objective.onepass import _CrossEntropies

    teachers = [sparse(draw(i)) for i in (30, 31)]
    ids, probs = torch.stack([t.ids for t in teachers], 1), torch.stack([t.log_probs.exp() for t in teachers], 1)
    tail = torch.stack([t.tail.exp() for t in teachers if t.tail is not None], 1)

    def outputs(student: Tensor) -> tuple[Tensor, Tensor]:
        cross, label, _ = _CrossEntropies.apply(student, ids, probs, tail, torch.arange(POSITIONS), 1.5, True)
        return cross, label

    assert torch.autograd.gradcheck(outputs, (draw(32).requires_grad_(),))


@pytest.mark.parametrize(
    "loss",
    sorted(
        n
        for n, s in LOSSES.items()
        if "logits" in s.inputs and "hidden" not in s.inputs and not s.labels and "columns" not in s.needs
    ),
)
def test_every_divergence_takes_cached_teachers_beside_live_ones(loss: str) -> None:
    """In tiles with a head; a cache that keeps every column is the live teacher, whatever the loss."""
    temperature = float(LOSSES[loss].temperature({})[0])
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(1, POSITIONS, 6, generator=generator), torch.randn(COLUMNS, 6, generator=generator)
    live = [DenseLogits(draw(i).float()) for i in (40, 41)]
    stored = [cached(sparse(x.values, COLUMNS, temperature)) for x in live]
    results = []
    for teachers in ([live[0], live[1]], [live[0], stored[1]], [stored[0], stored[1]]):
        results.append(objective_loss(hidden, weight, teachers, [row(loss, 2), row("ce", target="labels")]))
    for other in results[1:]:
        for ours, theirs in zip(other, results[0], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def objective_loss(hidden: Tensor, weight: Tensor, teachers: Sequence[Logits], rows: list[Row]) -> tuple[Tensor, ...]:
    """(loss, gradients) of logits rows in tiles, as the objective compares them."""
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    mask = torch.ones(1, POSITIONS, dtype=torch.bool)
    batch = Batch(torch.zeros(1).long(), mask.long(), mask, 2 * torch.arange(POSITIONS)[None])
    weights, at = torch.tensor([[0.3], [0.7]]).expand(2, POSITIONS), positions_of(rows, batch, True)
    counts, size = [POSITIONS] * len(rows), 3
    first, *more = passes_for(rows, counts, teachers, at, weights, token_level=True, size=size, pieces=EVERY_PIECE)
    head = HeadLogits(*leaves, None, COLUMNS)
    loss, _ = tiled(head, at.index, weights, first, tile=size, dtype=torch.float32, more=more)
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def test_sampled_targets_have_the_whole_gradient_and_value_in_the_mean() -> None:
    """Drawn targets are unbiased: the mean of 4,000 draws is the whole teacher's, within 4.5 standard errors."""
    logits, student = draw(50)[:1], draw(51)[:1].requires_grad_()
    kl = (logits.log_softmax(-1).exp() * (logits.log_softmax(-1) - student.log_softmax(-1))).sum()
    (exact,) = torch.autograd.grad(kl, student)
    repeats = 4000
    for proposal in (1.0, 1.8):
        content = CacheContent("sampled", 6, 1.0, COLUMNS, proposal=proposal, seed=1)
        targets = _sampled(content, logits.expand(repeats, -1), np.zeros(repeats, np.int64), np.arange(repeats))
        codec = SampledCodec(COLUMNS, 6, proposal != 1)
        ids, log_weights = codec.decode(codec.encode(targets["ids"], targets["counts"], targets["importance"]))
        rows = SparseRows(
            torch.from_numpy(ids), torch.from_numpy(log_weights), None, 1.0, torch.from_numpy(targets["entropy"])
        )
        teacher = SparseLogits("t", torch.arange(repeats), rows, COLUMNS, {})
        many = student.detach().expand(repeats, -1).float().clone().requires_grad_()
        once = ReadOnce([row("kl")], [teacher], torch.arange(repeats), torch.zeros(repeats).long())
        tile = once.at(many, slice(0, repeats))
        assert tile is not None
        losses = tile.losses(row("kl"), torch.ones(1, repeats))
        assert losses is not None
        (gradients,) = torch.autograd.grad(losses.sum(), many)
        for found, wanted in (
            (gradients.double(), exact),
            (losses.detach().double()[:, None], kl.detach()[None, None]),
        ):
            error = found.std(0) / repeats**0.5
            assert bool(((found.mean(0) - wanted[0]).abs() <= 4.5 * error + 2e-4).all()), proposal


@pytest.mark.parametrize(
    ("asked", "targets", "reason"),
    [
        (row("kl"), "top", "temperature 1 in the row"),
        (row("mse", options={}), "top", "different temperatures|vectors"),
        (row("kl", options={"temperature": 2.0, "top": 9}), "top", "most probable columns"),
        (row("jsd", options={"temperature": 2.0}), "sampled", "unbiased"),
        (row("kl", ensemble="logits", options={"temperature": 2.0}), "sampled", "unbiased"),
    ],
)
def test_rows_that_a_cache_cannot_serve_are_refused(asked: Row, targets: str, reason: str) -> None:
    with pytest.raises(UserError) as error:
        check_cached_row(asked, targets, KEPT, 2.0, "stages.x.match[0]")
    assert re.search(reason, str(error.value))
    assert error.value.where == "stages.x.match[0]"


def test_rows_that_a_cache_serves_pass() -> None:
    content = CacheContent("top", KEPT, 2.0, COLUMNS)
    options = {"temperature": 2.0}
    check_cached_rows(
        [row("kl", options=options), row("jsd", options=options), row("ce", target="labels")], content, "x"
    )
    check_cached_rows([row("kl", options=options)], CacheContent("sampled", 3, 2.0, COLUMNS), "x")
    check_cached_rows([row("mse"), row("kl")], CacheContent("classes", 0, 1.0, COLUMNS), "x")
    with pytest.raises(UserError, match="only at positions with a target"):
        check_cached_rows([row("kl", options=options, positions="all")], content, "x")


def test_a_row_at_another_temperature_is_refused_while_training_too() -> None:
    """Once per micro-batch, for every logits row and cached teacher; live teachers and label rows pass."""
    teacher = cached(sparse(draw(60), temperature=2.0))
    for loss in ("kl", "jsd"):
        with pytest.raises(UserError, match="different temperatures"):
            check_known([row("ce", target="labels"), row(loss)], [DenseLogits(draw(61).float()), teacher])


def test_traits_of_a_cached_teacher() -> None:
    """Those of the columns it keeps are the live teacher's; one that was not stored is refused."""
    logits = draw(70).float()
    teacher = cached(sparse(logits))
    teacher.traits["ce"] = torch.arange(POSITIONS).float()
    targets = torch.arange(POSITIONS)[None]
    batch = Batch(torch.arange(1), targets, torch.ones(1, POSITIONS, dtype=torch.bool), targets)
    traits = Traits([teacher, DenseLogits(logits)], Around(batch), "token", 3)
    for name in ("confidence", "margin"):
        ours, live = traits.read(name)
        torch.testing.assert_close(ours, live)
        torch.testing.assert_close(ours[0], TRAITS[name](logits, None))
    assert bool((traits.agreement == 1).all())
    torch.testing.assert_close(traits.ce[0, 0], torch.arange(POSITIONS).float())
    with pytest.raises(UserError, match="does not know the trait 'entropy'"):
        traits.read("entropy")
    teacher = cached(sparse(logits, temperature=2.0))
    with pytest.raises(UserError, match="'confidence'"):
        teacher.trait("confidence", torch.arange(3))
    assert teacher.trait("choice", torch.arange(3)).tolist() == logits[:3].argmax(-1).tolist()


def test_what_no_cache_can_give_is_refused() -> None:
    teacher = cached(sparse(draw(80)))
    with pytest.raises(UserError, match="no whole rows"):
        teacher.rows(torch.arange(2))
    with pytest.raises(UserError, match="compressed vocabulary"):
        teacher.select(torch.arange(2))
    elsewhere = SparseLogits("t", torch.tensor([-1, 0]), teacher.values, COLUMNS, {})
    with pytest.raises(DataError, match="nothing at a position"):
        elsewhere.sparse(torch.arange(2))


def test_a_user_written_loss_takes_a_cached_teacher() -> None:
    """It is given k + 1 outcomes and needs to know of no cache."""

    def total_variation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
        return (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1) / 2

    asked = Row(Match(loss="kl"), LossSpec("mine", total_variation, ("logits",)), "0:mine", (((0, 0),),))
    student, teacher = draw(90).float(), sparse(draw(91).float())
    assert teacher.tail is not None
    found = ensemble_losses(asked, student, [teacher], torch.ones(1, POSITIONS), None)
    p = torch.cat([teacher.log_probs.exp(), teacher.tail.exp()[:, None]], -1)
    q = outcomes(student.log_softmax(-1), teacher.ids)
    torch.testing.assert_close(found, (p - q).abs().sum(-1) / 2)


def test_no_positions_give_zero_loss_and_gradients() -> None:
    teacher = cached(sparse(draw(92)))
    index = torch.zeros(0, dtype=torch.int64)
    once = ReadOnce([row("kl")], [teacher], index, index)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, POSITIONS, 6).requires_grad_(), torch.randn(COLUMNS, 6).requires_grad_()

    def tile_loss(ours: Tensor, weights: Tensor, at: slice) -> tuple[Tensor, Tensor]:
        tile = once.at(ours, at)
        assert tile is not None
        losses = tile.losses(row("kl"), weights)
        assert losses is not None
        return losses.sum(), losses.sum().detach()[None]

    head = HeadLogits(hidden, weight, None, COLUMNS)
    loss, _ = tiled(head, index, torch.ones(1, 0), tile_loss, tile=4, dtype=torch.float32)
    found = torch.autograd.grad(loss, (hidden, weight))
    assert float(loss.detach()) == 0
    assert not any(bool(x.any()) for x in found)
