"""Drawing tokens: exact distributions, noise that depends on nothing but its numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest
from torch import Tensor

from mtkd.models.sampling import CHOOSING, Sampling, draw, kept_logits, uniforms

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.2, 0.0, -3.0, 1.9])
DRAWS = 20_000


def probabilities(how: Sampling) -> np.ndarray:
    """The distribution by its definition, a token at a time, in float64."""
    weights = np.exp(LOGITS.double().numpy() / how.temperature)
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: how.top_k or None]
    mass, nucleus = 0.0, []
    for token in kept:  # the fewest whose mass reaches top_p
        if mass >= how.top_p:
            break
        nucleus.append(token)
        mass += weights[token] / weights[kept].sum()
    probs = np.zeros(len(weights))
    probs[nucleus] = weights[nucleus] / weights[nucleus].sum()
    return probs


HOWS = [Sampling(1), Sampling(1, 0.5), Sampling(1, 2.0), Sampling(1, top_k=3), Sampling(1, top_p=0.7),
        Sampling(1, 1.5, top_p=0.9, top_k=5)]  # fmt: skip


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_draws_have_the_exact_distribution(how: Sampling) -> None:
    """Law: counts of 20,000 draws fit the exact probabilities (chi-square), and tokens of mass 0 never come."""
    noise = uniforms(5, 7, range(DRAWS), [0] * DRAWS, 1)[:, 0]
    columns, log_probs = draw(LOGITS.expand(DRAWS, -1), how, noise)
    expected = probabilities(how)
    counts = np.bincount(columns.numpy(), minlength=len(LOGITS))
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert chisquare(counts[possible], expected[possible] * DRAWS).pvalue > 1e-3
    assert np.exp(log_probs.double().numpy()) == pytest.approx(expected[columns.numpy()], rel=1e-5)


def test_noise_is_uniform_and_its_streams_share_nothing() -> None:
    """Law: each of seed, step, example, draw and use makes other numbers; together they are uniform."""
    base = {"seed": 1, "step": 2, "keys": [3], "draws": [0], "count": 500}
    first = uniforms(**base)
    others = [uniforms(**{**base, **change}) for change in
              ({"seed": 2}, {"step": 3}, {"keys": [4]}, {"draws": [1]}, {"use": CHOOSING})]  # fmt: skip
    every = torch.cat([first, *others]).flatten()
    assert len(every.unique()) == len(every)
    assert kstest(every.numpy(), "uniform").pvalue > 1e-3
    assert bool((every >= 0).all() & (every < 1).all())


def test_noise_of_a_row_depends_on_no_other_row() -> None:
    """Law: the same number for an example in any batch, at any place, in a longer text."""
    whole = uniforms(1, 2, [5, 6, 6, 9], [0, 0, 1, 0], 8)
    assert torch.equal(uniforms(1, 2, [6], [1], 8), whole[2:3])
    assert torch.equal(uniforms(1, 2, [9, 5], [0, 0], 3), whole[[3, 0], :3])


def test_greedy_takes_the_most_probable_token() -> None:
    columns, log_probs = draw(LOGITS.expand(2, -1), Sampling(1, temperature=0.0), None)
    assert columns.tolist() == [0, 0]
    assert log_probs.tolist() == pytest.approx([float(torch.log_softmax(LOGITS, -1)[0])] * 2)


@pytest.mark.parametrize("noise", [0.0, 1 - 2**-53])
def test_the_ends_of_the_noise_draw_possible_tokens(noise: float) -> None:
    """Law: the smallest and the largest uniform number draw the first and the last token with mass."""
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]])
    columns, log_probs = draw(logits, Sampling(1), torch.tensor([noise], dtype=torch.float64))
    assert columns.tolist() == [1 if noise == 0 else 2]
    assert bool(log_probs.isfinite())


def test_a_row_of_a_batch_is_drawn_as_alone() -> None:
    def rows(x: Tensor) -> list[list[float]]:
        return kept_logits(x, Sampling(1, 0.7, 0.8, 4)).tolist()

    batch = torch.stack([LOGITS, -LOGITS])
    assert rows(batch) == [rows(batch[:1])[0], rows(batch[1:])[0]]
