"""Laws of teachers that teach some domains: inside one an ensemble, between them a route."""

from __future__ import annotations

import pytest
import torch
from tiny import causal_batch, causal_model, make_objective, rows_of
from torch import Tensor

from mtkd.config import Named
from mtkd.config.match import Match
from mtkd.data.batch import Batch
from mtkd.engine.dist import Dist
from mtkd.running.train import global_counts

ROWS = [Match(feature="logits", loss="kl"), Match(feature="logits", loss="reverse_kl", weight=0.5)]
LENGTHS = (5, 7, 3, 6)
TEACH = ((True, True, False), (False, False, True), (True, False, True))
"""Of teachers a, b, c: domain 0 has a and b, domain 1 c, all others a and c."""


def gradient(batch: Batch, members: tuple[int, ...], weighting: str | Named, per: str, **more: object) -> Tensor:
    """Of the sum of the step's losses over some teachers, times the rows' share of all targets."""
    teachers = [causal_model(16, 1, seed=10 + k) for k in members]
    objective, pool = make_objective(causal_model(8, 1, seed=0), teachers, ROWS, weighting, per, **more)
    counts, _ = global_counts([batch], Dist(), more=objective.weighting.counts)
    objective.begin_step(0)
    loss, _ = objective(batch, pool.forward(batch), {**counts, "targets": 100, "sequences": 10})
    loss.backward()
    return torch.cat([p.grad.reshape(-1) for p in objective.student.parameters() if p.grad is not None])


@pytest.mark.parametrize("per", ["example", "token"])
@pytest.mark.parametrize(
    "weighting", ["uniform", "confidence", "margin", "mt_bert", Named(name="mt_bert", options={"normalise": True})]
)
def test_a_domain_has_the_ensemble_of_its_own_teachers(weighting: str | Named, per: str) -> None:
    """Law: a batch of two domains is the sum of two batches, each of its domain's teachers alone."""
    batch = causal_batch(LENGTHS)
    batch.routes = torch.tensor([0, 1, 0, 2])
    found = gradient(batch, (0, 1, 2), weighting, per, teach=TEACH)
    parts = [([0, 2], (0, 1)), ([1], (2,)), ([3], (0, 2))]
    wanted = sum(gradient(rows_of(batch, rows), members, weighting, per) for rows, members in parts)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_only_teacher_of_a_domain_is_not_dropped() -> None:
    """Law: DGKD's `drop` may leave out a domain's only teacher, which then teaches alone all the same."""
    batch = causal_batch(LENGTHS)
    batch.routes = torch.tensor([1, 1, 1, 1])
    drop = Named(name="drop", options={"count": 2})
    found = gradient(batch, (0, 1, 2), drop, "example", teach=TEACH)
    torch.testing.assert_close(found, gradient(batch, (2,), "uniform", "example"), rtol=1e-4, atol=1e-6)
