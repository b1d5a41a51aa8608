"""Losses against short transcriptions of their formulas (numpy, loops, scipy, torch's own kl_div) and their limits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.special
import torch
from torch import Tensor
from torch.nn import functional

from mtkd.losses.spec import LOSSES


def rand(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """The registered function in float64, at all positions unless a mask is given."""
    if mask is None:
        shapes = {2: student.shape[:1], 3: student.shape[:2], 4: student.shape[::2][:2]}
        mask = torch.ones(shapes[student.dim()], dtype=torch.bool)
    return LOSSES[name].function(student, teacher, mask, **options)


def gradient(name: str, student: Tensor, teacher: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    student = student.clone().requires_grad_()
    (found,) = torch.autograd.grad(run(name, student, teacher, mask, **options).sum(), student)
    return found


DIVERGENCES = (
    "kl",
    "reverse_kl",
    "jsd",
    "skew_kl",
    "reverse_skew_kl",
    "total_variation",
    "adaptive_kl",
    "todi",
    "soft_ce",
)


def same(found: Tensor, wanted: object) -> None:
    torch.testing.assert_close(found, torch.as_tensor(np.asarray(wanted), dtype=found.dtype), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_against_loops(temperature: float) -> None:
    student, teacher, square = rand(4, 6), rand(4, 6, seed=1), temperature**2
    forward, reverse, soft = [], [], []
    for s, t in zip((student / temperature).numpy(), (teacher / temperature).numpy(), strict=True):
        p, q = scipy.special.softmax(t), scipy.special.softmax(s)
        forward.append(square * sum(p[v] * math.log(p[v] / q[v]) for v in range(6)))
        reverse.append(square * scipy.special.rel_entr(q, p).sum())
        soft.append(square * -sum(p[v] * math.log(q[v]) for v in range(6)))
    same(run("kl", student, teacher, temperature=temperature), forward)
    same(run("reverse_kl", student, teacher, temperature=temperature), reverse)
    same(run("soft_ce", student, teacher, temperature=temperature), soft)
    same(run("kl", student, teacher, temperature=temperature, scale=False), np.array(forward) / square)


def test_kl_against_torchs_kl_div() -> None:
    student, teacher = rand(5, 7), rand(5, 7, seed=1)
    log_s, log_t = torch.log_softmax(student / 3, -1), torch.log_softmax(teacher / 3, -1)
    wanted = 9 * functional.kl_div(log_s, log_t, reduction="none", log_target=True).sum(-1)
    same(run("kl", student, teacher, temperature=3.0), wanted)


@pytest.mark.parametrize("name", ["kl", "soft_ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 10.0])
def test_gradient_of_distillation(name: str, temperature: float) -> None:
    student, teacher = rand(5, 7), rand(5, 7, seed=1)
    wanted = temperature * (torch.softmax(student / temperature, -1) - torch.softmax(teacher / temperature, -1))
    same(gradient(name, student, teacher, temperature=temperature), wanted)


def test_high_temperature_is_the_mean_squared_error_of_centred_logits() -> None:
    student, teacher = rand(5, 7), rand(5, 7, seed=1)
    centred = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    wanted = (centred[0] - centred[1]) / 7  # gradient of sum_c (difference)^2 / 2, times 1/C
    found = gradient("kl", student, teacher, temperature=1e4)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert float((gradient("kl", student, teacher, temperature=1.0) - wanted).abs().max()) > 0.1


def test_without_scale_the_gradient_shrinks_with_the_temperature() -> None:
    student, teacher = rand(5, 7), rand(5, 7, seed=1)
    plain = gradient("kl", student, teacher, temperature=10.0, scale=False)
    same(100 * plain, gradient("kl", student, teacher, temperature=10.0))


def test_jsd_against_scipy_and_its_own_symmetry() -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    p, q = scipy.special.softmax(teacher.numpy(), -1), scipy.special.softmax(student.numpy(), -1)
    # scipy gives the distance, the square root of the divergence
    same(
        run("jsd", student, teacher),
        [scipy.spatial.distance.jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)],
    )
    same(run("jsd", student, teacher), run("jsd", teacher, student))
    same(run("jsd", student, teacher, beta=0.3), run("jsd", teacher, student, beta=0.7))
    assert float((run("jsd", student, teacher, beta=0.3) - run("jsd", teacher, student, beta=0.3)).abs().max()) > 1e-3


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_beta_is_the_teachers_share_of_the_mixture(beta: float) -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    wanted = []
    for s, t in zip(student.numpy() / 2, teacher.numpy() / 2, strict=True):
        p, q = scipy.special.softmax(t), scipy.special.softmax(s)
        m = beta * p + (1 - beta) * q
        parts = scipy.special.rel_entr(p, m).sum(), scipy.special.rel_entr(q, m).sum()
        wanted.append(4 * (beta * parts[0] + (1 - beta) * parts[1]))
    same(run("jsd", student, teacher, beta=beta, temperature=2.0), wanted)


def test_limits_of_jsd() -> None:
    student, teacher, small = rand(4, 6), rand(4, 6, seed=1), 1e-6
    forward = run("jsd", student, teacher, beta=small) / small
    reverse = run("jsd", student, teacher, beta=1 - small) / small
    torch.testing.assert_close(forward, run("kl", student, teacher), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(reverse, run("reverse_kl", student, teacher), rtol=1e-3, atol=1e-5)


def test_the_ends_of_jsd_are_the_two_kls() -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    for beta, name in ((0.0, "kl"), (1.0, "reverse_kl")):
        same(run("jsd", student, teacher, beta=beta, temperature=3.0), run(name, student, teacher, temperature=3.0))
        same(gradient("jsd", student, teacher, beta=beta), gradient(name, student, teacher))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_skewed_divergences_against_scipy(alpha: float, temperature: float) -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    skew, reverse = [], []
    for s, t in zip(student.numpy() / temperature, teacher.numpy() / temperature, strict=True):
        p, q = scipy.special.softmax(t), scipy.special.softmax(s)
        skew.append(temperature**2 * scipy.special.rel_entr(p, alpha * p + (1 - alpha) * q).sum())
        reverse.append(temperature**2 * scipy.special.rel_entr(q, (1 - alpha) * p + alpha * q).sum())
    same(run("skew_kl", student, teacher, alpha=alpha, temperature=temperature), skew)
    same(run("reverse_skew_kl", student, teacher, alpha=alpha, temperature=temperature), reverse)


@pytest.mark.parametrize("name", ["skew_kl", "reverse_skew_kl"])
def test_a_skewed_divergence_is_bounded_where_the_sides_have_nothing_in_common(name: str) -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])
    torch.testing.assert_close(run(name, student, teacher, alpha=0.2), torch.tensor([-math.log(0.2)]))


def test_total_variation_against_the_largest_difference_of_an_event() -> None:
    student, teacher = rand(4, 6), rand(4, 6, seed=1)
    p, q = scipy.special.softmax(teacher.numpy(), -1), scipy.special.softmax(student.numpy(), -1)
    events = [list(event) for size in range(7) for event in itertools.combinations(range(6), size)]
    same(
        run("total_variation", student, teacher),
        [max((a[e] - b[e]).sum() for e in events) for a, b in zip(p, q, strict=True)],
    )
    apart = run("total_variation", torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert float(apart) == 1


def adaptive(p: np.ndarray, q: np.ndarray, mu: float) -> tuple[float, float]:
    """(share of the head, value) of the adaptive KL of one position, by a loop over the teacher's ranking."""
    head, mass = [], 0.0
    for v in np.argsort(-p):
        if mass >= mu:
            break
        head.append(v)
        mass += p[v]
    share = np.abs(p - q)[head].sum() / np.abs(p - q).sum()
    forward, reverse = scipy.special.rel_entr(p, q).sum(), scipy.special.rel_entr(q, p).sum()
    return share, share * forward + (1 - share) * reverse


@pytest.mark.parametrize(("mu", "columns", "scale"), [(0.5, 6, 2.0), (0.9, 6, 2.0), (0.5, 700, 2.0), (0.99, 700, 0.1)])
def test_adaptive_kl_against_a_loop(mu: float, columns: int, scale: float) -> None:
    """700 nearly equal columns: the head is wider than the first guess of it."""
    student, teacher = rand(3, columns, scale=scale), rand(3, columns, seed=1, scale=scale)
    p, q = scipy.special.softmax(teacher.numpy(), -1), scipy.special.softmax(student.numpy(), -1)
    wanted = [adaptive(a, b, mu) for a, b in zip(p, q, strict=True)]
    same(run("adaptive_kl", student, teacher, mu=mu), [value for _, value in wanted])
    share = torch.tensor([share for share, _ in wanted])[:, None]
    forward, reverse = (gradient(name, student, teacher) for name in ("kl", "reverse_kl"))
    same(gradient("adaptive_kl", student, teacher, mu=mu), share * forward + (1 - share) * reverse)
    assert len({round(share, 3) for share, _ in wanted}) == 3  # it does adapt


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_todi_against_a_loop(beta: float) -> None:
    """The paper's sum over columns, and its derivative with the weights held: by the chain rule, written out."""
    student, teacher = rand(3, 6, scale=2.0), rand(3, 6, seed=1, scale=2.0)
    p, q = scipy.special.softmax(teacher.numpy(), -1), scipy.special.softmax(student.numpy(), -1)
    values, slopes = [], []
    for row_p, row_q in zip(p, q, strict=True):
        total, by_q = 0.0, []
        for a, b in zip(row_p, row_q, strict=True):
            share = 1 / (1 + (b / a) ** beta)
            total += share * a * math.log(a / b) + (1 - share) * b * math.log(b / a)
            by_q.append(-share * a / b + (1 - share) * (math.log(b / a) + 1))
        values.append(total)
        slopes.append(
            [b * (d - sum(x * y for x, y in zip(row_q, by_q, strict=True))) for b, d in zip(row_q, by_q, strict=True)]
        )
    same(run("todi", student, teacher, beta=beta), values)
    same(gradient("todi", student, teacher, beta=beta), slopes)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "adaptive_kl"])
def test_top_is_the_divergence_of_the_buckets(name: str) -> None:
    student, teacher = rand(3, 9), rand(3, 9, seed=1)

    def buckets(logits: Tensor) -> Tensor:
        rows = []
        for values, best in zip(torch.softmax(logits / 2, -1), teacher.topk(4, -1).indices, strict=True):
            others = [v for v in range(9) if v not in best.tolist()]
            rows.append(torch.stack([*(values[v] for v in best), values[others].sum()]))
        return torch.stack(rows).log()

    wanted = 4 * run(name, buckets(student), buckets(teacher))
    same(run(name, student, teacher, top=4, temperature=2.0), wanted)
    same(run(name, student, teacher, top=9), run(name, student, teacher))


def test_values_that_mean_nothing_are_refused() -> None:
    logits = rand(2, 3)
    for beta in (-0.1, 1.1):
        with pytest.raises(ValueError, match="beta"):
            run("jsd", logits, logits, beta=beta)
    for name, alpha in itertools.product(("skew_kl", "reverse_skew_kl"), (-0.1, 1.0)):
        with pytest.raises(ValueError, match="alpha"):
            run(name, logits, logits, alpha=alpha)
    for mu in (0.0, 1.0):
        with pytest.raises(ValueError, match="mu is"):
            run("adaptive_kl", logits, logits, mu=mu)
    with pytest.raises(ValueError, match="beta must"):
        run("todi", logits, logits, beta=-0.1)
    for name in ("reverse_kl", "jsd", "skew_kl", "reverse_skew_kl", "total_variation", "todi", "soft_ce"):
        with pytest.raises(ValueError, match="top is"):
            run(name, logits, logits, top=-1)
    for name in DIVERGENCES:
        with pytest.raises(ValueError, match="temperature"):
            run(name, logits, logits, temperature=0.0)
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match="smoothing"):
            run("ce", logits, torch.tensor([0, 1]), smoothing=smoothing)


def test_identical_models_have_exactly_no_divergence() -> None:
    logits = rand(4, 9).float()
    for name in ("kl", "reverse_kl"):
        assert run(name, logits, logits, temperature=3.0).tolist() == [0.0] * 4


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_ce_against_a_loop(smoothing: float) -> None:
    student, labels = rand(4, 5), torch.tensor([0, 4, 2, 2])
    wanted = []
    for s, y in zip(student.numpy(), labels.tolist(), strict=True):
        logs = np.log(np.exp(s) / np.exp(s).sum())
        wanted.append(-(1 - smoothing) * logs[y] - smoothing * logs.mean())
    same(run("ce", student, labels, smoothing=smoothing), wanted)


def test_label_mse() -> None:
    same(run("label_mse", torch.tensor([[1.5], [-1.0]]), torch.tensor([1.0, 1.0])), [0.25, 4.0])


def test_vector_distances_against_numpy() -> None:
    student, teacher = rand(2, 3, 8), rand(2, 3, 8, seed=1)
    s, t = student.numpy(), teacher.numpy()
    same(run("mse", student, teacher), ((s - t) ** 2).mean(-1))
    unit = [x / np.sqrt((x**2).sum(-1, keepdims=True)) for x in (s, t)]
    same(run("normalized_mse", student, teacher), ((unit[0] - unit[1]) ** 2).mean(-1))
    same(run("normalized_mse", student, teacher, sum_over_width=True), ((unit[0] - unit[1]) ** 2).sum(-1))
    wanted = [[scipy.spatial.distance.cosine(s[b, i], t[b, i]) for i in range(3)] for b in range(2)]
    same(run("cosine", student, teacher), wanted)


def test_pkd_is_invariant_to_scale_and_is_twice_the_cosine_distance() -> None:
    student, teacher = rand(2, 3, 8), rand(2, 3, 8, seed=1)
    same(run("normalized_mse", 5 * student, 0.01 * teacher), run("normalized_mse", student, teacher))
    same(run("normalized_mse", student, teacher, sum_over_width=True), 2 * run("cosine", student, teacher))
    assert float((run("mse", 5 * student, teacher) - run("mse", student, teacher)).abs().min()) > 0.1


def scores(*shape: int, mask: Tensor, seed: int) -> Tensor:
    return rand(*shape, seed=seed).masked_fill(~mask[:, None, None, :], -torch.inf)


MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def test_attention_mse_against_loops() -> None:
    student, teacher = (scores(2, 3, 4, 4, mask=MASK, seed=seed) for seed in (0, 1))
    found = run("attention_mse", student, teacher, MASK)
    for b, keys in enumerate((4, 2)):
        for i in range(keys):
            differences = [float(student[b, a, i, j] - teacher[b, a, i, j]) ** 2 for a in range(3) for j in range(keys)]
            assert float(found[b, i]) == pytest.approx(sum(differences) / len(differences), rel=1e-9)


def test_attention_mse_keeps_large_negative_scores_and_drops_masked_ones() -> None:
    mask = torch.ones(1, 3, dtype=torch.bool)
    student, teacher = torch.zeros(1, 1, 3, 3), torch.full((1, 1, 3, 3), -200.0)
    same(run("attention_mse", student, teacher, mask), [[200.0**2] * 3])
    teacher[..., 2] = -torch.inf  # masked on one side alone
    teacher[..., 0] = 0
    same(run("attention_mse", student, teacher, mask), [[200.0**2 / 2] * 3])


def test_attention_mse_shows_a_fault_at_a_real_position() -> None:
    student, teacher = torch.zeros(1, 1, 3, 3), torch.zeros(1, 1, 3, 3)
    student[0, 0, 1, 1] = torch.nan
    found = run("attention_mse", student, teacher, torch.ones(1, 3, dtype=torch.bool))
    assert found.isnan().tolist() == [[False, True, False]]


def test_attention_kl_against_loops_without_a_second_softmax() -> None:
    student, teacher = (torch.softmax(scores(2, 3, 4, 4, mask=MASK, seed=seed), -1) for seed in (0, 1))
    found = run("attention_kl", student, teacher, MASK)
    for b, keys in enumerate((4, 2)):
        for i in range(keys):
            wanted = np.mean(
                [scipy.special.rel_entr(teacher[b, a, i].numpy(), student[b, a, i].numpy()).sum() for a in range(3)]
            )
            assert float(found[b, i]) == pytest.approx(wanted, rel=1e-9)
    again = run("attention_kl", torch.softmax(student, -1), torch.softmax(teacher, -1), MASK)
    assert float(found[0].mean()) > 5 * float(again[0].mean())


def relation_by_loops(student: Tensor, teacher: Tensor, mask: Tensor, heads: int) -> np.ndarray:
    """MiniLMv2 with plain loops: [B,A,L,D] -> [B,L]; 0 at padded queries."""
    batch, length = mask.shape
    out = np.zeros((batch, length))
    for b in range(batch):
        keys = [j for j in range(length) if mask[b, j]]
        for i in keys:
            for r in range(heads):
                sides = []
                for x in (student, teacher):
                    joined = np.concatenate(list(x[b].numpy()), axis=-1)  # [L, A*D]
                    width = joined.shape[1] // heads
                    part = joined[:, r * width : (r + 1) * width]
                    sides.append(scipy.special.softmax([part[i] @ part[j] / math.sqrt(width) for j in keys]))
                out[b, i] += scipy.special.rel_entr(sides[1], sides[0]).sum() / heads
    return out


@pytest.mark.parametrize("heads", [0, 2, 4])
def test_relation_kl_against_loops(heads: int) -> None:
    student, teacher = rand(2, 4, 4, 6, scale=1.0), rand(2, 4, 4, 6, seed=1, scale=1.0)
    found = run("relation_kl", student, teacher, MASK, heads=heads).masked_fill(~MASK, 0)
    same(found, relation_by_loops(student, teacher, MASK, heads or 4))


def test_relation_kl_between_12_and_16_heads() -> None:
    student, teacher = rand(2, 12, 4, 8, scale=1.0), rand(2, 16, 4, 9, seed=1, scale=1.0)
    found = run("relation_kl", student, teacher, MASK, heads=48).masked_fill(~MASK, 0)
    same(found, relation_by_loops(student, teacher, MASK, 48))
    with pytest.raises(ValueError, match="36 relation heads do not divide a total width of 96"):
        run("relation_kl", student, teacher, MASK, heads=36)


def test_relation_kl_is_invariant_to_a_rotation_inside_a_relation_head() -> None:
    student, teacher = rand(2, 4, 4, 6, scale=1.0), rand(2, 4, 4, 6, seed=1, scale=1.0)
    rotation = torch.linalg.qr(rand(6, 6, seed=2)).Q
    same(run("relation_kl", student @ rotation, teacher, MASK), run("relation_kl", student, teacher, MASK))
    found, plain = (run("relation_kl", x, teacher, MASK, heads=8) for x in (student @ rotation, student))
    assert float((found - plain).abs().max()) > 1e-3  # heads of width 3: the rotation crosses them


def test_relation_kl_leaves_padded_keys_out_of_the_softmax() -> None:
    student, teacher = rand(1, 2, 4, 6, scale=1.0), rand(1, 2, 4, 6, seed=1, scale=1.0)
    short = run("relation_kl", student[:, :, :3], teacher[:, :, :3])
    mask = torch.tensor([[True, True, True, False]])
    same(run("relation_kl", student, teacher, mask)[:, :3], short)
    assert float((run("relation_kl", student, teacher)[:, :3] - short).abs().max()) > 1e-3
