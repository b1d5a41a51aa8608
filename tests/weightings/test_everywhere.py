"""Weights where there is no target: prompts under rows over all positions, and examples without any target."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import causal_batch, causal_model, make_objective
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.batch import NO_LABEL, Batch, position_counts
from mtkd.models.features import as_logits
from mtkd.objective.objective import Objective
from mtkd.pool import TeacherPool
from mtkd.weightings import Traits, Weighting
from mtkd.weightings.spec import WEIGHTINGS, WeightingSpec

ALL = Match(feature="logits", loss="kl", positions="all")
HIDDEN = Match(feature="hidden", loss="mse", teacher_layer=1)
LENGTHS = (8, 6, 5)


def wired(weighting: str, rows: tuple[Match, ...], per: str = "token", tile: int = 5) -> tuple[Objective, TeacherPool]:
    teachers = [causal_model(16, 1, 1), causal_model(24, 1, 2)]
    return make_objective(causal_model(16, 1, 0), teachers, rows, weighting, per=per, tile=tile)


def batch() -> Batch:
    """Prompts of three tokens; the last example asks for nothing at all."""
    made = causal_batch(LENGTHS, prompt=3)
    made.targets[2] = NO_LABEL
    return made


def weights_of(objective: Objective, pool: TeacherPool, made: Batch) -> Tensor:
    student = objective.student(made, objective.student_wants | {"logits"})
    logits = objective.teacher_logits(pool.forward(made))
    counts = {**position_counts([made]), **objective.step_counts(made)}
    return objective.weigher.weights(made, logits, student, counts).values


def probabilities(objective: Objective, pool: TeacherPool, made: Batch) -> Tensor:
    """Student, then teachers, in float64, [3,B,L,V]: whole, without tiles."""
    features = [objective.student(made, frozenset({"logits"})), *pool.forward(made)]
    every = torch.arange(made.input_ids.numel())
    whole = [as_logits(f["logits"]).rows(every).double().softmax(-1) for f in features]
    return torch.stack(whole).detach().reshape(3, *made.input_ids.shape, -1)


def errors(probs: Tensor, made: Batch) -> Tensor:
    """Cross entropy of the teachers; the example's mean without a label; log V in an example without any, [2,B,L]."""
    found = -probs[1:].log().gather(-1, made.targets.clamp_min(0)[None, ..., None].expand(2, -1, -1, 1)).squeeze(-1)
    mask = made.target_mask
    for k in range(2):
        for b in range(len(LENGTHS)):
            labelled = found[k, b][mask[b]]
            mean = labelled.mean() if len(labelled) else torch.tensor(math.log(probs.shape[-1]))
            found[k, b] = torch.where(mask[b], found[k, b], mean)
    return found


def entropies(probs: Tensor) -> Tensor:
    return -(probs * probs.log()).sum(-1)


def expected(name: str, probs: Tensor, made: Batch) -> Tensor:
    """The papers' formulas at every token."""
    if name == "mt_bert":
        return 1 / (1 + errors(probs, made))
    if name == "ca_mkd":
        return 1 - torch.softmax(errors(probs, made), 0)
    if name == "entropy":
        return 1 - entropies(probs[1:]) / entropies(probs[1:]).sum(0)
    if name == "confidence":
        return torch.softmax(probs[1:].amax(-1) / 0.1, 0)
    if name == "margin":
        top = probs[1:].topk(2, -1).values
        return torch.softmax((top[..., 0] - top[..., 1]) / 0.1, 0)
    assert name == "uncertainty"
    unsure = entropies(probs[0]) / math.log(probs.shape[-1])
    return torch.stack([unsure, 1 - unsure])  # the first teacher is the smaller one


@pytest.mark.parametrize("name", ["mt_bert", "ca_mkd", "entropy", "confidence", "margin", "uncertainty"])
@pytest.mark.parametrize("rows", [(ALL,), (HIDDEN,), (ALL, HIDDEN, Match(loss="ce", target="labels"))])
def test_prompts_have_weights_of_their_own(name: str, rows: tuple[Match, ...]) -> None:
    """Per token the formula holds at every token; a trait that needs a label has the example's mean elsewhere."""
    objective, pool = wired(name, rows)
    made = batch()
    found, wanted = weights_of(objective, pool, made), expected(name, probabilities(objective, pool, made), made)
    at = made.token_mask.expand(2, -1, -1)
    torch.testing.assert_close(found[at].double(), wanted[at], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tile", [1, 4, 100])
def test_the_loss_over_all_positions_is_the_plain_sum(tile: int) -> None:
    """GLMD's row and one on hidden states, weighted per token, are the sums written out, in tiles of any size."""
    objective, pool = wired("mt_bert", (ALL, HIDDEN), tile=tile)
    made = batch()
    _, metrics = objective(made, pool.forward(made), position_counts([made]))
    probs, at = probabilities(objective, pool, made), made.token_mask
    weights = expected("mt_bert", probs, made)
    divergence = (probs[1:] * (probs[1:] / probs[:1]).log()).sum(-1)
    assert float(metrics["row/0:logits:kl"]) == pytest.approx(float((weights * divergence)[:, at].sum() / at.sum()))
    ours = objective.student(made, frozenset({"hidden.1"}))["hidden.1"]
    theirs = [features["hidden.1"] for features in pool.forward(made)]
    keys = [f"row1_teacher{k}" for k in range(2)]
    adapters = [objective.projections[key] if key in objective.projections else torch.nn.Identity() for key in keys]
    gaps = [(a(ours) - t).square().mean(-1) for a, t in zip(adapters, theirs, strict=True)]
    total = sum((w * gap)[at].sum() for w, gap in zip(weights, gaps, strict=True))
    assert float(metrics["row/1:hidden:mse"]) == pytest.approx(float(total / at.sum()), rel=1e-5)


@pytest.mark.parametrize("per", ["token", "example"])
def test_an_example_without_a_target_is_weighed_all_the_same(per: str) -> None:
    """Its tokens are read by rows over all positions: their own traits, or the mean of them; never those of nothing."""
    made = batch()
    for name in ("uncertainty", "entropy", "mt_bert"):
        objective, pool = wired(name, (ALL,), per)
        found = weights_of(objective, pool, made)[:, 2, : LENGTHS[2]]
        probs = probabilities(objective, pool, made)[:, 2, : LENGTHS[2]]
        if name == "mt_bert":
            wanted = torch.full_like(found, 1 / (1 + math.log(probs.shape[-1])))
        else:
            values = entropies(probs) if per == "token" else entropies(probs).mean(1, keepdim=True)
            unsure = values[0] / math.log(probs.shape[-1])
            shares = 1 - values[1:] / values[1:].sum(0)
            wanted = torch.stack([unsure, 1 - unsure]) if name == "uncertainty" else shares
        torch.testing.assert_close(found.double(), wanted.double()[:, : found.shape[1]], rtol=1e-4, atol=1e-6)


def test_nothing_is_computed_where_no_weight_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows on targets alone ask the teachers at targets alone: prompts cost nothing."""
    asked: list[int] = []

    class Counting(Weighting):
        def forward(self, traits: Traits) -> Tensor:
            known = traits.where("entropy")
            asked.append(int(known.sum()))
            return traits.full(0.5)

    monkeypatch.setitem(WEIGHTINGS._values, "counting", WeightingSpec("counting", Counting))
    made = batch()
    for rows, wanted in (
        ((Match(loss="kl"),), made.target_mask),
        ((ALL,), made.token_mask),
        ((HIDDEN,), made.token_mask),
    ):
        objective, pool = wired("counting", rows)
        weights_of(objective, pool, made)
        assert asked.pop() == int(wanted.sum())
    objective, pool = wired("counting", (ALL.model_copy(update={"weighted": False}),))
    weights_of(objective, pool, made)
    assert asked.pop() == int(made.target_mask.sum())
