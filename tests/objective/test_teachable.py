"""`positions: teachable`: the formula, the denominator, its share in the log, caches, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from rollout_runs import rollout_config
from tiny import causal_batch, causal_model, make_objective
from torch import Tensor

import mtkd
from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.errors import UserError
from mtkd.models.taps import TappedModel
from mtkd.objective.compile import Row
from mtkd.objective.teachable import teachable

HOW = {"top": 12, "mass": 0.2}
KEY, SHARE = "row/0:logits:{}", "teachable/0:logits:{}"


def logits(model: TappedModel, batch: Batch) -> Tensor:
    """[targets,V] of the library's own model, in float64."""
    whole = model.model.double().eval()
    with torch.no_grad():
        made = whole(batch.input_ids, batch.attention_mask.long()).logits[batch.target_mask]
    model.model.float()
    return made


def expected(student: Tensor, teachers: list[Tensor], weights: Tensor, loss: str) -> tuple[float, float]:
    """(mean loss over all targets, share of those with one), position by position."""
    total, kept = 0.0, 0
    for place in range(len(student)):
        own = torch.log_softmax(student[place], -1)
        candidates = own.argsort(descending=True)[:12].tolist()
        probs = [torch.softmax(t[place], -1) for t in teachers]
        mass = sum(float(w * p[v]) for w, p in zip(weights[:, place], probs, strict=True) for v in candidates)
        if mass >= 0.2:
            kept += 1
            for w, p in zip(weights[:, place], probs, strict=True):
                forward, backward = (p * (p.log() - own)).sum(), (own.exp() * (own - p.log())).sum()
                total += float(w * (forward if loss == "kl" else backward))
    return total / len(student), kept / len(student)


@pytest.mark.parametrize("loss", ["kl", "reverse_kl"])
@pytest.mark.parametrize("teachers", [1, 2])
def test_a_position_counts_where_the_teachers_mass_is_on_the_students_candidates(loss: str, teachers: int) -> None:
    """Law: per token weights of two; the mean is over all targets; in tiles; the gradient is that of the kept ones."""
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2 + k) for k in range(teachers)]
    batch = causal_batch((9, 5, 7, 8), prompt=2)
    match = Match(loss=loss, positions="teachable", candidates=HOW)
    objective, pool = make_objective(student, models, [match], "entropy", per="token")
    value, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    sides = [logits(model, batch) for model in models]
    probs = [torch.log_softmax(x, -1) for x in sides]
    entropies = torch.stack([-(p.exp() * p).sum(-1) for p in probs])
    weights = 1 - entropies / entropies.sum(0) if teachers == 2 else torch.ones_like(entropies)
    wanted, share = expected(logits(student, batch), sides, weights, loss)
    assert 0.1 < share < 0.9
    assert float(metrics[SHARE.format(loss)]) == pytest.approx(share, abs=1e-6)
    assert float(value) == pytest.approx(wanted, rel=1e-4)
    assert float(metrics[KEY.format(loss)]) == pytest.approx(wanted, rel=1e-4)


def test_micro_batches_add_up() -> None:
    """Law: loss, share and gradient of 4 rows are those of 2 + 2: the denominator knows nothing of the selection."""
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2)]
    objective, pool = make_objective(student, models, [Match(loss="kl", positions="teachable", candidates=HOW)])
    whole = causal_batch((9, 5, 7, 8))
    parts = [
        Batch(whole.keys[r], whole.input_ids[r], whole.attention_mask[r], whole.targets[r])
        for r in (slice(0, 2), slice(2, 4))
    ]
    sides = []
    for batches in ([whole], parts):
        student.zero_grad()
        counts, values = position_counts(batches), torch.zeros(2)
        for batch in batches:
            loss, metrics = objective(batch, pool.forward(batch), counts)
            loss.backward()
            values += torch.stack([loss.detach(), metrics[SHARE.format("kl")]])
        sides.append([values, *(p.grad.clone() for p in student.parameters() if p.grad is not None)])
    for a, b in zip(*sides, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_all_mass_on_all_candidates_is_every_position() -> None:
    """Law: with as many candidates as columns the row is that of all targets, and its share 1; next to another row."""
    student, models = causal_model(16, 2, seed=1), [causal_model(16, 1, seed=2 + k) for k in range(2)]
    batch = causal_batch((9, 5, 7, 8))
    rows = [
        Match(loss="kl", positions="teachable", candidates={"top": 999, "mass": 0.999}),
        Match(loss="kl", positions="all"),
        Match(loss="kl"),
    ]
    objective, pool = make_objective(student, models, rows)
    _, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    assert float(metrics[SHARE.format("kl")]) == pytest.approx(1)
    assert float(metrics["row/0:logits:kl"]) == pytest.approx(float(metrics["row/2:logits:kl"]), rel=1e-5)


def test_shares_and_not_sizes_of_weights_count() -> None:
    """Law: ten times the weights select the same; a row that is not weighted reads equal shares."""
    student, one, other = (
        torch.tensor([[3.0, 2.0, 0.0, 0.0]]),
        torch.tensor([[9.0, 0, 0, 0]]),
        torch.tensor([[0, 0, 0, 9.0]]),
    )

    def kept(share: float, size: float = 1.0, *, weighted: bool = True) -> bool:
        match = Match(loss="kl", positions="teachable", candidates={"top": 2, "mass": 0.6}, weighted=weighted)
        row = Row(match, mtkd.LOSSES["kl"], "x", (((0, 0),),) * 2)
        return bool(teachable(row, student, [one, other], size * torch.tensor([[share], [1 - share]])))

    assert (kept(0.9), kept(0.3)) == (kept(0.9, 10), kept(0.3, 10)) == (True, False)
    assert not kept(0.9, weighted=False)


@pytest.mark.parametrize(
    "row",
    [
        {"feature": "hidden", "loss": "mse", "positions": "teachable"},
        {"loss": "ce", "target": "labels", "positions": "teachable"},
        {"loss": "kl", "candidates": {"top": 3}},
        {"loss": "kl", "positions": "teachable", "candidates": {"top": 0}},
        {"loss": "kl", "positions": "teachable", "candidates": {"mass": 1.5}},
    ],
)
def test_rows_without_a_meaning_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=r"teachable|candidates"):
        Match(**row)


def test_gradients_of_some_positions_are_not_compared(tmp_path: Path) -> None:
    match = [{"feature": "logits", "loss": "reverse_kl", "positions": "teachable"}]
    teachers = ["stage:teacher", {"name": "again", "model": "stage:teacher"}]
    student = {"match": match, "teachers": teachers, "weighting": "mgda"}
    with pytest.raises(UserError, match="positions: teachable") as caught:
        mtkd.plan(rollout_config(tmp_path, {}, student=student))
    assert caught.value.where == "stages.student.weighting"
