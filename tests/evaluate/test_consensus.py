"""How far teachers agree, against numbers by hand and plain loops in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtkd.evaluate.consensus import divergence, summary, tally
from mtkd.evaluate.report.wording import agreement_text
from mtkd.models.features import SparseRows

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2


def js(p: list[float], q: list[float]) -> float:
    """``(KL(p, m) + KL(q, m)) / 2`` with m the mean of the two."""
    total = 0.0
    for a, b in zip(p, q, strict=True):
        m = (a + b) / 2
        total += (a * math.log(a / m) if a else 0.0) / 2 + (b * math.log(b / m) if b else 0.0) / 2
    return total


def kept(logits: Tensor, k: int) -> SparseRows:
    log_probs = torch.log_softmax(logits.double(), -1)
    best, ids = log_probs.topk(k, -1)
    tail = torch.log((1 - best.exp().sum(-1)).clamp_min(1e-30))
    return SparseRows(ids, best.float(), tail.float(), 1.0)


def test_two_sure_teachers_by_hand() -> None:
    """Opposite certainties are log 2 apart, equal ones 0."""
    one = torch.tensor([[0.0, 200.0], [0.0, 200.0]])
    other = torch.tensor([[200.0, 0.0], [0.0, 200.0]])
    assert divergence(one, other).tolist() == pytest.approx([math.log(2), 0], abs=1e-12)
    assert tally([one, other]).tolist() == pytest.approx([1, math.log(2)])


def test_three_teachers_are_plain_loops() -> None:
    sums = tally(list(LOGITS)).tolist()
    probs = torch.softmax(LOGITS.double(), -1).tolist()
    choices = [[row.index(max(row)) for row in teacher] for teacher in probs]
    same = sum(len({teacher[case] for teacher in choices}) == 1 for case in range(5))
    pairs = [(0, 1), (0, 2), (1, 2)]
    apart = [sum(js(probs[i][case], probs[j][case]) for case in range(5)) for i, j in pairs]
    assert sums == pytest.approx([same, *apart])
    found = summary(["a", "b", "c"], 5, sums)
    assert found["same"] == same / 5
    assert list(found["divergence"].items()) == [
        (name, pytest.approx(value / 5)) for name, value in zip(("a, b", "a, c", "b, c"), apart, strict=True)
    ]


@pytest.mark.parametrize("sides", ["live", "both"])
def test_cached_teachers_with_all_columns_are_live_ones(sides: str) -> None:
    whole = kept(LOGITS[0], 7), LOGITS[1] if sides == "live" else kept(LOGITS[1], 7)
    torch.testing.assert_close(divergence(*whole), divergence(*LOGITS[:2]), rtol=1e-5, atol=1e-6)
    assert tally(list(whole))[0] == tally(list(LOGITS[:2]))[0]


@pytest.mark.parametrize("k", [1, 3])
def test_what_a_cache_left_out_is_one_outcome(k: int) -> None:
    """Coarser outcomes are never further apart; those both know are compared one by one."""
    one, other = (torch.softmax(x.double(), -1) for x in LOGITS[:2])
    found = divergence(kept(LOGITS[0], k), kept(LOGITS[1], k))
    assert bool((found <= divergence(*LOGITS[:2]) + 1e-6).all())
    for case in range(5):
        columns = sorted(set(one[case].topk(k).indices.tolist()) & set(other[case].topk(k).indices.tolist()))
        p, q = one[case][columns].tolist(), other[case][columns].tolist()
        assert found[case].item() == pytest.approx(js([*p, 1 - sum(p)], [*q, 1 - sum(q)]), abs=1e-6)


@pytest.mark.parametrize(
    ("same", "words"), [(0.97, "one of them to do as well"), (0.8, "compare with the best"), (0.4, "weights matter")]
)
def test_advice_goes_with_the_share(same: float, words: str) -> None:
    text = agreement_text({"same": same, "cases": 1234, "divergence": {"a, b": 0.25, "a, c": 0.35}})
    assert words in text
    assert f"{same:.0%} of 1,234 cases" in text
    assert "0.300 nats" in text


def test_unsure_teachers_are_no_reason_for_weights() -> None:
    assert "hardly differ" in agreement_text({"same": 0.2, "cases": 9, "divergence": {"a, b": 0.002}})
    assert "as well" in agreement_text({"same": 0.99, "cases": 9, "divergence": {"a, b": 0.002}})


def test_a_damaged_record_says_nothing() -> None:
    for found in ({}, {"same": "x", "cases": 3, "divergence": {}}, {"same": 0.5, "cases": 3, "divergence": 7}):
        assert agreement_text(found) == ""
