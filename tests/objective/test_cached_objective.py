"""A whole objective whose teachers are read from a cache: loss, gradient, weights and Gram matrix of the live ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import NUM_IDS, causal_batch, causal_model, make_objective
from torch import Tensor

from mtkd.config.match import Match
from mtkd.data.batch import Batch, position_counts
from mtkd.errors import UserError
from mtkd.methods.papers import kd
from mtkd.models.features import Features
from mtkd.objective.gram import gram
from mtkd.pool.cache import CacheContent, CacheOrigin, CacheReader, CacheWriter, make_records

LENGTHS = (6, 9, 4)
EVERY = CacheContent("top", NUM_IDS, 1.0, NUM_IDS, ("hidden.1",), True, "float32", 12, scalars=("entropy",))
ROWS = [*kd(temperature=1.0).values(), Match(loss="jsd"), Match(feature="hidden", loss="mse", teacher_layer=1)]


def stored(folder: Path, content: CacheContent, batch: Batch, features: Features) -> CacheReader:
    origin = CacheOrigin("t", "k", "d", "train", len(batch.keys), {}, "fp32")
    writer = CacheWriter(folder, content, origin, shard_examples=2)
    records = make_records(content, batch, features, tile=4)
    for number, ids in writer.missing():
        writer.write(number, [records[i] for i in ids])
    writer.finish()
    return CacheReader(folder)


def results(
    weighting: str,
    tmp_path: Path,
    content: CacheContent,
    cached: tuple[int, ...],
    rows: Iterable[Match] = ROWS,
    prompt: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, the student's gradient, Gram matrix) of two teachers, some of them from a cache."""
    teachers = [causal_model(16, 1, 1), causal_model(24, 2, 2)]
    objective, pool = make_objective(causal_model(16, 2, 0), teachers, list(rows), weighting, per="token")
    generator = torch.Generator().manual_seed(5)
    for adapter in objective.projections.values():
        adapter.weight.data = torch.randn(adapter.weight.shape, generator=generator)
    batch = causal_batch(LENGTHS, prompt=prompt)
    features = pool.forward(batch)
    for k in cached:
        reader = stored(tmp_path / f"{weighting}{k}", content, batch, features[k])
        # as another epoch would: other rows, in another order
        features[k] = reader.read(batch.keys.tolist()).features(f"t{k}", batch, objective.teacher_wants(k))
    counts = {**position_counts([batch]), **objective.step_counts(batch)}
    matrix = gram(objective, batch, features, counts)
    loss, _ = objective(batch, features, counts)
    loss.backward()
    gradients = [p.grad.reshape(-1) for p in objective.student.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients), matrix


@pytest.mark.parametrize("weighting", ["uniform", "confidence", "margin", "entropy", "ca_mkd"])
@pytest.mark.parametrize("cached", [(0,), (0, 1)])
def test_a_cache_of_every_column_is_the_live_teacher(weighting: str, cached: tuple[int, ...], tmp_path: Path) -> None:
    """12 bits per log-probability leave a relative error of about 1e-3; mixed pools are the same."""
    live, ours = (results(weighting, tmp_path, EVERY, which) for which in ((), cached))
    for found, wanted in zip(ours, live, strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("cached", [(0,), (0, 1)])
def test_the_text_of_a_prompt_counts_in_a_cache_as_live(cached: tuple[int, ...], tmp_path: Path) -> None:
    """`posterior`, with a row on hidden states that reads its weights at prompts: the cache has every token."""
    content = replace(EVERY, scalars=("token_log_probs",))
    live, ours = (results("posterior", tmp_path, content, which, prompt=2) for which in ((), cached))
    for found, wanted in zip(ours, live, strict=True):
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3 * float(wanted.abs().max()))


@pytest.mark.parametrize("weighting", ["uniform", "entropy", "ca_mkd"])
@pytest.mark.parametrize("cached", [(0,), (0, 1)])
def test_prompts_of_a_cache_have_the_examples_mean(weighting: str, cached: tuple[int, ...], tmp_path: Path) -> None:
    """A cache knows no trait of a prompt: a row on hidden states weighs it with the mean over the example's targets.

    With one teacher live or none: traits are compared with each other, so both are means there.
    """
    hidden = [Match(loss="kl", weight=1e-6), Match(feature="hidden", loss="mse", teacher_layer=1)]
    both, one = (results(weighting, tmp_path / str(k), EVERY, k, hidden, prompt=2) for k in ((0, 1), cached))
    torch.testing.assert_close(one[0], both[0], rtol=5e-3, atol=0)
    assert float(both[0]) > 0


def test_a_trait_that_was_not_stored_is_named(tmp_path: Path) -> None:
    """A weighting on a cache that lacks its trait is refused with the trait."""
    content = CacheContent("top", 5, 1.0, NUM_IDS, ("hidden.1",), dtype="float32")
    with pytest.raises(UserError, match="trait 'ce'"):
        results("ca_mkd", tmp_path, content, (0,))


def test_drawn_targets_have_no_gram(tmp_path: Path) -> None:
    """A weighting that reads gradients is refused where a cache holds drawn targets."""
    content = CacheContent("sampled", 50, 1.0, NUM_IDS)
    with pytest.raises(UserError, match="inner products"):
        results("uniform", tmp_path, content, (0, 1), kd(temperature=1.0).values())
