"""Laws of calibrated logits: the formula on every kind of logits, and nothing at all at temperature 1."""

from __future__ import annotations

import pytest
import torch

from mtkd.errors import UserError
from mtkd.models.calibrated import CalibratedLogits, Calibration, calibrated
from mtkd.models.features import DenseLogits, HeadLogits, Logits, SparseLogits, SparseRows

CHANCE = torch.Generator().manual_seed(0)
HEAD = HeadLogits(
    torch.randn(2, 3, 4, generator=CHANCE),
    torch.randn(9, 4, generator=CHANCE),
    torch.randn(9, generator=CHANCE),
    7,
    torch.tanh,
)
DENSE = DenseLogits(torch.randn(6, 7, generator=CHANCE))
INDEX = torch.tensor([4, 0, 3])


@pytest.mark.parametrize("logits", [HEAD, DENSE], ids=["head", "dense"])
def test_logits_are_divided_and_shifted(logits: Logits) -> None:
    """Law: logits / temperature + bias, also of chosen columns and after a cast; a soft cap comes before it."""
    bias = tuple(0.1 * i for i in range(7))
    made, columns = calibrated(logits, Calibration(0.4, bias)), torch.tensor([5, 1])
    expected = logits.rows(INDEX) / 0.4 + torch.tensor(bias)
    assert made.num_columns == 7
    assert torch.equal(made.rows(INDEX), expected)
    torch.testing.assert_close(made.select(columns).rows(INDEX), expected[:, columns])
    assert torch.equal(made.in_dtype(torch.float32).rows(INDEX), expected)


@pytest.mark.parametrize("logits", [HEAD, DENSE, DENSE.values], ids=["head", "dense", "tensor"])
def test_temperature_one_is_the_teacher_itself(logits: Logits | torch.Tensor) -> None:
    """Law: bit by bit, for no operation is added."""
    made = calibrated(logits, Calibration(1.0))
    assert not isinstance(made, CalibratedLogits)
    assert made is logits or (isinstance(made, DenseLogits) and made.values is logits)


def test_a_specialist_is_divided_as_a_whole() -> None:
    """Law: the probability of its own classes is that of a softmax over all outputs at the temperature."""
    other = torch.randn(6, 2, generator=CHANCE)
    made = calibrated(DenseLogits(DENSE.values, other), Calibration(0.4))
    assert isinstance(made, DenseLogits)
    whole = torch.softmax(torch.cat([DENSE.values, other], -1) / 0.4, -1)
    torch.testing.assert_close(made.own_mass(), whole[:, :7].sum(-1))


def sparse(logits: torch.Tensor, k: int) -> SparseLogits:
    """The k most probable columns of some rows, and the mass of the others."""
    log_probs = torch.log_softmax(logits, -1)
    best, ids = log_probs.topk(k, -1)
    tail = log_probs.scatter(-1, ids, -torch.inf).logsumexp(-1)
    rows = SparseRows(ids, best, tail, 1.0)
    return SparseLogits("t", torch.arange(len(logits)), rows, logits.shape[1], {"ce": torch.zeros(len(logits))})


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_a_cache_has_k_and_one_outcomes(temperature: float) -> None:
    """Law: k + 1 outcomes; the tail is above the truth below temperature 1, and below it above 1."""
    logits = torch.randn(50, 12, generator=CHANCE, dtype=torch.float64)
    made = calibrated(sparse(logits, 4), Calibration(temperature))
    assert isinstance(made, SparseLogits)
    rows, truth = made.sparse(torch.arange(50)), torch.log_softmax(logits / temperature, -1)
    assert rows.tail is not None
    whole = rows.log_probs.exp().sum(-1) + rows.tail.exp()
    torch.testing.assert_close(whole, torch.ones_like(whole))
    gap = rows.tail.exp() - truth.exp().scatter(-1, rows.ids, 0).sum(-1)
    assert bool((gap > 0).all()) if temperature < 1 else bool((gap < 0).all())
    torch.testing.assert_close(  # among the kept columns all odds are exact
        rows.log_probs - rows.log_probs[:, :1], truth.gather(-1, rows.ids) - truth.gather(-1, rows.ids[:, :1])
    )
    assert made.traits == {}


def test_a_cache_that_keeps_all_but_one_column_is_exact() -> None:
    """Law: a tail of one column is that column."""
    logits = torch.randn(20, 5, generator=CHANCE, dtype=torch.float64)
    made = calibrated(sparse(logits, 4), Calibration(0.3))
    assert isinstance(made, SparseLogits)
    rows, truth = made.sparse(torch.arange(20)), torch.log_softmax(logits / 0.3, -1)
    torch.testing.assert_close(rows.log_probs, truth.gather(-1, rows.ids))


def test_draws_are_refused() -> None:
    """Law: draws at one temperature say nothing exact of another."""
    logits = sparse(torch.randn(3, 5, generator=CHANCE), 2)
    logits.values.tail = None
    with pytest.raises(UserError, match="holds draws"):
        calibrated(logits, Calibration(0.3))
