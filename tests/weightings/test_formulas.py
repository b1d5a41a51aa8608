"""The weightings of issue 3 against their formulas, closed forms and enumerations."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_weightings import LOGITS, TARGETS, batch_of, by_hand
from torch import Tensor

from mtkd.data.batch import NO_LABEL
from mtkd.models.features import DenseLogits
from mtkd.weightings import Around, StageFacts, Traits
from mtkd.weightings.draws import uniform, uniform_of
from mtkd.weightings.hull import smallest_norm
from mtkd.weightings.learned import Learned
from mtkd.weightings.reinforced import RLKD, some_chosen
from mtkd.weightings.spec import WEIGHTINGS
from mtkd.weightings.uncertainty import Uncertainty

NAMES = ("a", "b", "c")
FACTS = StageFacts(NAMES, (30, 10, 20), width=4, classes=0, seed=5)
CLASS_LOGITS, CLASS_TARGETS = LOGITS[:, :, :, :3].reshape(3, 8, 3), torch.tensor([0, 1, 2, 0, NO_LABEL, 1, 1, 2])


def traits(logits: Tensor, targets: Tensor, per: str = "example", around: Around | None = None) -> Traits:
    return Traits([DenseLogits(x) for x in logits], around or Around(batch_of(targets)), per, 3)


def test_margin_against_its_formula() -> None:
    """w = softmax of the margins over tau, each margin summed by hand."""
    found = WEIGHTINGS["margin"].cls(tau=0.3)(traits(LOGITS, TARGETS, "token"))
    for b, i in (TARGETS != NO_LABEL).nonzero().tolist():
        powers = [math.exp(by_hand(LOGITS[k, b, i].tolist(), 0)["margin"] / 0.3) for k in range(3)]
        assert found[:, b, i].tolist() == pytest.approx([p / sum(powers) for p in powers], abs=1e-5)


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_energy_against_its_formula(tau: float) -> None:
    """w_k is proportional to (sum_v exp z_kv)^(1/tau), Liu et al. 2020, equation 3; the scale of logits counts."""
    found = WEIGHTINGS["energy"].cls(tau=tau)(traits(LOGITS, TARGETS, "token"))
    for b, i in (TARGETS != NO_LABEL).nonzero().tolist():
        masses = [sum(math.exp(z) for z in LOGITS[k, b, i].tolist()) ** (1 / tau) for k in range(3)]
        assert found[:, b, i].tolist() == pytest.approx([m / sum(masses) for m in masses], abs=1e-5)


# uncertainty


def with_student(student: Tensor, targets: Tensor) -> Around:
    return Around(batch_of(targets), student={"logits": DenseLogits(student)})


@pytest.mark.parametrize("per", ["example", "token"])
def test_two_teachers_share_by_the_students_uncertainty(per: str) -> None:
    """Li et al. 2021: the small teacher has u = H / log V, the large one 1 - u."""
    student = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(3))
    facts = replace(FACTS, teachers=NAMES[:2], sizes=(30, 10))
    found = Uncertainty(facts)(traits(LOGITS[:2], TARGETS, per, with_student(student, TARGETS)))
    for b in range(2):
        at = [i for i in range(4) if TARGETS[b, i] != NO_LABEL]
        shares = {i: by_hand(student[b, i].tolist(), 0)["entropy"] / math.log(5) for i in at}
        for i in at if per == "token" else [0]:
            u = shares[i] if per == "token" else sum(shares.values()) / len(shares)
            assert found[:, b, i].tolist() == pytest.approx([1 - u, u], abs=1e-5)


def test_the_more_uncertain_the_student_the_smaller_the_teacher() -> None:
    """The mean size of the teachers falls as the student's entropy rises."""
    sharp = torch.tensor([100.0, 3.2, 1.6, 0.8, 0.0])
    student = torch.nn.functional.one_hot(torch.zeros(5, dtype=torch.int64), 3) * sharp[:, None]
    targets = torch.zeros(5, dtype=torch.int64)
    around = with_student(student, targets)
    soft = Uncertainty(FACTS)(traits(LOGITS[:, 0, :1, :3].expand(3, 5, 3), targets, around=around))[..., 0]
    assert soft[:, 0].tolist() == pytest.approx([1, 0, 0])  # certain: the largest
    assert soft[:, -1].tolist() == pytest.approx([0, 1, 0], abs=1e-5)  # knows nothing: the smallest
    mean_size = (soft * torch.tensor(FACTS.sizes)[:, None]).sum(0)
    assert bool((mean_size.diff() < 0).all())
    hard = Uncertainty(FACTS, mode="hard")(traits(LOGITS[:, 0, :1, :3].expand(3, 5, 3), targets, around=around))[..., 0]
    for b, logits in enumerate(student.tolist()):
        u = by_hand(logits, 0)["entropy"] / math.log(3)
        number = min(int((1 - u) * 3), 2)  # of the sizes in order: 10 (b), 20 (c), 30 (a)
        assert hard[:, b].tolist() == [float(number == 2), float(number == 0), float(number == 1)]


def test_teachers_of_equal_size_share() -> None:
    """Teachers of one size have equal weights."""
    around = with_student(torch.zeros(1, 3), torch.tensor([0]))
    facts = replace(FACTS, sizes=(7, 7, 9))
    found = Uncertainty(facts)(traits(LOGITS[:, 0, :1, :3], torch.tensor([0]), around=around))
    assert found[:, 0, 0].tolist() == pytest.approx([0.5, 0.5, 0.0], abs=1e-5)


# gradient space


def test_two_gradients_against_the_closed_form() -> None:
    """The point nearest to 0 on the segment between g_1 and g_2: w_1 = clip(<g_2 - g_1, g_2> / |g_1 - g_2|^2)."""
    random = np.random.default_rng(0)
    clipped = 0
    for _ in range(50):
        one, two = random.normal(size=(2, 3)) * random.lognormal(size=(2, 1))
        weight = (two - one) @ two / ((one - two) @ (one - two))
        clipped += not 0 < weight < 1
        for largest in (1.0, 0.7):
            wanted = np.clip(weight, 1 - largest, largest)
            gradients = np.stack([one, two])
            np.testing.assert_allclose(smallest_norm(gradients @ gradients.T, largest), [wanted, 1 - wanted], atol=2e-6)
    assert 5 < clipped < 45  # both kinds are among them


@pytest.mark.parametrize("largest", [1.0, 0.5, 0.3])
def test_four_gradients_satisfy_the_kkt_conditions(largest: float) -> None:
    """With slope G w: no weight can move from a high to a low entry of the gradient."""
    random = np.random.default_rng(1)
    for _ in range(30):
        gradients = random.normal(size=(4, 6)) + random.normal(size=6)
        gram = gradients @ gradients.T
        weights, slope = smallest_norm(gram, largest), None
        assert weights.sum() == pytest.approx(1)
        assert weights.min() >= 0
        assert weights.max() <= largest + 1e-7
        slope = gram @ weights / np.abs(gram).max()
        can_fall, can_rise = weights > 1e-5, weights < largest - 1e-5
        assert slope[can_fall].max() - slope[can_rise].min() < 1e-5


def test_a_bound_of_a_share_is_uniform() -> None:
    """c <= 1/T leaves the uniform weights, and the scale of the Gram matrix changes nothing."""
    gram = np.diag([1.0, 2.0, 300.0, 4.0])
    for largest in (0.25, 0.2):
        assert smallest_norm(gram, largest).tolist() == [0.25] * 4
    assert smallest_norm(np.zeros((4, 4)), 1.0).tolist() == [0.25] * 4
    for scale in (1e-30, 1.0, 1e30):
        np.testing.assert_allclose(smallest_norm(np.diag([1.0, 3.0]) * scale, 1.0), [0.75, 0.25], atol=1e-6)


# drop


def weights_of_step(name: str, step: int, facts: StageFacts, **options: object) -> list[float]:
    around = Around(batch_of(CLASS_TARGETS), step=step)
    found = WEIGHTINGS[name].cls(facts, **options)(
        traits(CLASS_LOGITS[: len(facts.teachers)], CLASS_TARGETS, around=around)
    )
    assert bool((found == found[:, :1]).all())
    return found[:, 0, 0].tolist()


def test_dropped_teachers() -> None:
    """One teacher of three is out, each as often as another; the rest share equally."""
    drawn = [weights_of_step("drop", step, FACTS, count=1) for step in range(600)]
    assert {tuple(sorted(x)) for x in drawn} == {(0.0, 0.5, 0.5)}
    counts = [sum(x[k] == 0 for x in drawn) for k in range(3)]
    assert all(abs(count - 200) < 4 * math.sqrt(600 * 2 / 9) for count in counts), counts  # 4 standard deviations
    assert drawn[:50] != [weights_of_step("drop", step, replace(FACTS, seed=6)) for step in range(50)]
    assert {tuple(sorted(weights_of_step("drop", step, FACTS, count=9))) for step in range(20)} == {(0.0, 0.0, 1.0)}
    other = replace(FACTS, teachers=("c", "a", "b"))
    assert [weights_of_step("drop", step, other) for step in range(50)] == [[x[2], x[0], x[1]] for x in drawn[:50]]
    assert weights_of_step("drop", 0, FACTS, count=0) == pytest.approx([1 / 3] * 3)


def test_draws_look_uniform_and_independent() -> None:
    """Means, correlations and repeats of the draws are those of independent uniform numbers."""
    values = uniform_of(("x", "y"), 7, 0, np.arange(20_000))
    assert values.shape == (2, 20_000)
    assert 0 <= values.min() < values.max() < 1
    for row in values:
        assert abs(row.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 20_000)
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(values)[0, 1]) < 0.03
    assert float(uniform(7, 1)[0]) != float(uniform(1, 7)[0])
    assert np.array_equal(uniform("x", 7, 0, np.arange(3)), values[0, :3])


# route


def test_a_route_is_the_named_teacher() -> None:
    """The weight is 1 for the teacher that the example names."""
    around = Around(batch_of(CLASS_TARGETS[:3], torch.tensor([0, 1, -1]), torch.tensor([2, 0, -1])))
    found = WEIGHTINGS["route"].cls()(traits(CLASS_LOGITS[:, :3], CLASS_TARGETS[:3], around=around))
    assert found[..., 0].t().tolist()[:2] == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]


# learned


def learned_traits(module: Learned, logits: Tensor, targets: Tensor, per: str = "example") -> Traits:
    ids = torch.arange(len(targets)) + 5
    batch = batch_of(targets, ids)
    counts = {"sequences": len(ids), "targets": int((targets != NO_LABEL).sum()), **module.counts(batch)}
    pooled = torch.randn(len(ids), FACTS.width, generator=torch.Generator().manual_seed(9))
    hidden = pooled[:, None].expand(-1, batch.input_ids.shape[1], -1)
    return traits(logits, targets, per, Around(batch, counts, student={"hidden": hidden}))


@pytest.mark.parametrize(("logits", "targets"), [(LOGITS, TARGETS), (CLASS_LOGITS, CLASS_TARGETS)])
@pytest.mark.parametrize("gate", ["none", "pooled"])
def test_the_anchors_likelihood_and_the_entropy(logits: Tensor, targets: Tensor, gate: str) -> None:
    """The penalty is minus the anchors' mean log-likelihood, minus the entropy of the weights."""
    module = Learned(FACTS, gate=gate, anchor_share=0.6, entropy=0.3)
    with torch.no_grad():
        module.theta.copy_(torch.tensor([0.3, -1.0, 0.5]))
        if module.gate is not None:
            module.gate.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    held = learned_traits(module, logits, targets)
    weights = module(held)
    missed, entropies, anchors = [], [], 0
    for b, example in enumerate(held.around.keys.tolist()):
        h = held.pooled[b].double()
        state = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() / 4
        scores = module.theta.double() + (module.gate.double() @ state if module.gate is not None else 0)
        share = (scores.exp() / scores.exp().sum()).tolist()
        assert weights[:, b, 0].tolist() == pytest.approx(share, abs=1e-5)
        entropies.append(-sum(w * math.log(w) for w in share))
        is_anchor = float(uniform("anchor", np.array([example]))[0]) < 0.6
        anchors += is_anchor
        for i, label in enumerate(targets[b].reshape(-1).tolist()):
            if is_anchor and label != NO_LABEL:
                probs = torch.softmax(logits[:, b].reshape(3, -1, logits.shape[-1])[:, i].double(), -1)[:, label]
                missed.append(-math.log(sum(w * float(p) for w, p in zip(share, probs, strict=True))))
    assert 0 < anchors < len(targets)
    wanted = sum(missed) / len(missed) - 0.3 * sum(entropies) / len(entropies)
    assert float(module.penalty(held)) == pytest.approx(wanted, rel=1e-5)


def test_learned_weights_are_trained_by_their_penalty_alone() -> None:
    """Rows see the weights detached; the penalty's gradient is that of finite differences."""
    module = Learned(FACTS, gate="pooled", anchor_share=0.6).double()
    held = learned_traits(module, CLASS_LOGITS, CLASS_TARGETS)
    assert not module(held).requires_grad
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in module.parameters()]

    def penalty(theta: Tensor, gate: Tensor) -> Tensor:
        return torch.func.functional_call(_Penalty(module), {"module.theta": theta, "module.gate": gate}, (held,))

    assert torch.autograd.gradcheck(penalty, [x.requires_grad_() for x in start], atol=1e-4, eps=1e-4)


class _Penalty(torch.nn.Module):
    def __init__(self, module: Learned) -> None:
        super().__init__()
        self.module = module

    def forward(self, held: Traits) -> Tensor:
        return self.module.penalty(held)


def test_anchors_are_the_same_examples_whatever_batch_they_are_in() -> None:
    """Whether an example is an anchor depends on its number alone."""
    module, ids = Learned(FACTS, anchor_share=0.25), torch.arange(4000)
    labels = torch.zeros(4000, dtype=torch.int64)
    whole = module._anchors(batch_of(labels, ids))
    assert abs(int(whole.sum()) - 1000) < 4 * math.sqrt(4000 * 0.25 * 0.75)
    assert torch.equal(module._anchors(batch_of(labels[:66], ids[1234:1300])), whole[1234:1300])


# rl_kd


def all_actions(count: int) -> Tensor:
    """[2**count - 1, T]: every choice but that of nobody."""
    return torch.tensor([x for x in itertools.product((0.0, 1.0), repeat=count) if any(x)], dtype=torch.float64)


def log_probability(scores: Tensor, actions: Tensor) -> Tensor:
    """log pi(a) of independent coins, given that not all of them fall on 0: [T,B] and [T,B] -> [B]."""
    chances = torch.sigmoid(scores)
    independent = (chances * actions + (1 - chances) * (1 - actions)).prod(0)
    return (independent / (1 - (1 - chances).prod(0))).log()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_probabilities_of_the_policy(count: int) -> None:
    """Law: each choice is drawn as often as its probability says, and never that of no teacher."""
    scores = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)[:count]
    actions = all_actions(count)
    wanted = torch.stack([log_probability(scores[:, None], a[:, None])[0] for a in actions]).exp()
    draws = torch.from_numpy(uniform_of(NAMES[:count], 0, np.arange(40_000)))
    drawn = some_chosen(scores[:, None].expand(-1, 40_000), draws).double().t()
    assert bool(drawn.any(1).all())
    shares = torch.stack([(drawn == a).all(1).double().mean() for a in actions])
    torch.testing.assert_close(shares, wanted, rtol=0, atol=0.01)  # 4 standard deviations of 40,000 draws


def test_a_policy_that_wants_nobody_still_chooses() -> None:
    """One teacher is on at least, each with the same chance."""
    scores = torch.full((3, 1000), -30.0, dtype=torch.float64)
    drawn = some_chosen(scores, torch.from_numpy(uniform_of(NAMES, 0, np.arange(1000))))
    assert bool(drawn.any(0).all())
    assert all(250 < int(row.sum()) < 420 for row in drawn)  # a third each


def reinforced(policy: Tensor, ids: Tensor, step: int, count: int = 2, **options: object) -> tuple[RLKD, Traits]:
    """A policy, and examples that look alike to it; the student's loss before the step is log 3 for each."""
    facts = StageFacts(NAMES[:count], (1,) * count, width=4, classes=3, seed=0)
    module = RLKD(facts, **options)
    with torch.no_grad():
        module.policy.copy_(policy)
    logits = CLASS_LOGITS[:count, :1].expand(-1, len(ids), -1)
    targets = CLASS_TARGETS[:1].expand(len(ids))
    pooled = torch.randn(4, generator=torch.Generator().manual_seed(2)).expand(len(ids), -1)
    student = {"logits": DenseLogits(torch.zeros(len(ids), 3)), "hidden": pooled[:, None]}
    around = Around(batch_of(targets, ids), {"sequences": len(ids)}, step, student)
    return module, traits(logits, targets, around=around)


@pytest.mark.parametrize("credit", ["example", "batch"])
def test_the_estimator_is_unbiased(credit: str) -> None:
    """K = 2, one example: the mean over actions of the estimator is the gradient of the expected reward.

    The gradient of ``sum_a pi(a) R(a)`` is taken by autograd over the enumerated actions; the estimator is what the
    weighting itself makes of each action, whatever the baseline.
    """
    policy = 0.5 * torch.randn(2, 9, generator=torch.Generator().manual_seed(4))
    module, held = reinforced(policy, torch.tensor([0]), 0, credit=credit)
    state = module._state(held)
    rewards = {(0.0, 1.0): -1.0, (1.0, 0.0): -0.2, (1.0, 1.0): -2.0}  # minus the loss after the step
    leaf = module.policy.detach().double().requires_grad_()
    scores = (leaf[:, None] * state).sum(-1)
    chances = {a: log_probability(scores, torch.tensor(a)[:, None]).exp()[0] for a in rewards}
    assert float(sum(chances.values())) == pytest.approx(1)
    (wanted,) = torch.autograd.grad(sum(p * rewards[a] for a, p in chances.items()), leaf)
    for baseline in (0.0, 3.0):
        expected = torch.zeros_like(wanted)
        for action, reward in rewards.items():
            score = module._score(module.scores(state).detach(), torch.tensor(action)[:, None].double(), state)
            module._seen = [(torch.tensor([True]), score, held.student_loss)]
            module.baseline.fill_(baseline)
            module.rewards.fill_(1)
            module.reward(module.judged([torch.tensor([-reward])]))
            expected += float(chances[action]) * -module.gradient.double()
        torch.testing.assert_close(expected, wanted, rtol=1e-4, atol=1e-5)


def test_the_score_is_the_gradient_of_log_pi() -> None:
    """The weighting's score is autograd's gradient of the log of its policy."""
    policy = torch.randn(3, 9, generator=torch.Generator().manual_seed(5))
    module, held = reinforced(policy, torch.arange(50), 3, count=3)
    weights = module(held)[..., 0]
    assert torch.allclose(weights.sum(0), torch.ones(50))
    assert {round(float(w), 4) for w in weights.unique()} <= {0.0, 0.3333, 0.5, 1.0}
    leaf = policy.double().requires_grad_()
    scores = (leaf[:, None] * module._state(held)).sum(-1)
    log_pi = log_probability(scores, (weights > 0).double()).sum()
    ((labelled, score, before),) = module._seen
    assert bool(labelled.all())
    assert before.tolist() == pytest.approx([math.log(3)] * 50)
    torch.testing.assert_close(score.sum(0), torch.autograd.grad(log_pi, leaf)[0])
    again, held = reinforced(policy, torch.arange(50), 3, count=3)
    assert torch.equal(again(held)[..., 0], weights)  # a function of seed, step, example and teacher
    other, held = reinforced(policy, torch.arange(50), 4, count=3)
    assert not torch.equal(other(held)[..., 0], weights)
    quiet, held = reinforced(policy, torch.arange(50), 3, count=3)
    quiet.eval()(held)
    assert quiet._seen == []


@pytest.mark.parametrize("credit", ["example", "batch"])
def test_rewards_against_their_formula(credit: str) -> None:
    """Three steps of four examples: ``-mean_i (gain_i - m) score_i``, or with the mean gain for every example."""
    module, held = reinforced(torch.zeros(2, 9), torch.arange(4), 0, credit=credit, decay=0.8)
    usual = None
    for step, after in enumerate(([1.0, 0.5, 2.0, 0.9], [0.8, 0.4, 1.0, 1.5], [0.1, 0.9, 0.3, 0.2])):
        module(held)
        score = module._seen[0][1]
        module.reward(module.judged([torch.tensor(after[:1]), torch.tensor(after[1:])]))
        gains = [math.log(3) - x for x in after]
        mean = sum(gains) / 4
        wanted = torch.zeros(2, 9, dtype=torch.float64)
        for gain, of_example in zip(gains, score, strict=True):
            if step:
                wanted -= ((gain if credit == "example" else mean) - usual) * of_example / 4
        torch.testing.assert_close(module.gradient.double(), wanted, rtol=1e-4, atol=1e-6)
        usual = mean if usual is None else 0.8 * usual + 0.2 * mean
        assert float(module.baseline) == pytest.approx(usual, abs=1e-5)
    loss = module.penalty(held)
    torch.testing.assert_close(torch.autograd.grad(loss, module.policy)[0], module.gradient)
