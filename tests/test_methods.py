"""Every method's rows, evaluated on random features, against a short transcription of its paper's formula."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.special
import torch
from torch import Tensor

from mtkd.match import Match
from mtkd.registry import LOSSES, METHODS, check_options

STUDENT_LAYERS, TEACHER_LAYERS, TOKENS, HEADS, WIDTH, COLUMNS = 2, 4, 5, 2, 6, 9
Rows = Sequence[Match]


def features(layers: int, seed: int) -> dict[str, Tensor]:
    """Features of one unpadded sequence, in float32."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    held = {"logits": 2 * rand(TOKENS, COLUMNS)}
    for k in range(layers + 1):
        held[f"hidden.{k}"] = rand(1, TOKENS, WIDTH)
        for name in ("query", "key", "value"):
            held[f"{name}.{k}"] = rand(1, HEADS, TOKENS, WIDTH // HEADS)
        held[f"scores.{k}"] = rand(1, HEADS, TOKENS, TOKENS)
    return {**held, "embedding": held["hidden.0"]}


S, T = features(STUDENT_LAYERS, 0), features(TEACHER_LAYERS, 1)
LABELS = torch.tensor([0, 3, 8, 8, 1])


def total(rows: Rows) -> float:
    """The sum of the rows' mean losses for one teacher of weight 1, by the registered losses."""
    value = 0.0
    for row in rows:
        spec = LOSSES[row.loss]
        check_options(row.options, spec.options(), "row")
        assert row.feature in spec.inputs
        if row.feature == "logits":
            target = LABELS if row.target == "labels" else T["logits"]
            found = spec(S["logits"], target, torch.ones(TOKENS, dtype=torch.bool), row.options).mean()
        else:
            plain = row.feature == "embedding"
            pairs = [(0, 0)] if plain else row.layer_pairs(STUDENT_LAYERS, TEACHER_LAYERS)
            mask, found = torch.ones(1, TOKENS, dtype=torch.bool), torch.zeros(())
            for s, t in pairs:
                ours, theirs = (row.feature, row.feature) if plain else (f"{row.feature}.{s}", f"{row.feature}.{t}")
                found = found + spec(S[ours], T[theirs], mask, row.options).mean()
        value += row.weight * float(found)
    return value


def softmax(name: str, side: dict[str, Tensor], temperature: float = 1.0) -> np.ndarray:
    return scipy.special.softmax(side[name].double().numpy() / temperature, -1)


def kl(temperature: float) -> float:
    p, q = softmax("logits", T, temperature), softmax("logits", S, temperature)
    return temperature**2 * float(scipy.special.rel_entr(p, q).sum(-1).mean())


def soft_ce(temperature: float) -> float:
    p, q = softmax("logits", T, temperature), softmax("logits", S, temperature)
    return temperature**2 * float(-(p * np.log(q)).sum(-1).mean())


def ce() -> float:
    return float(-np.log(softmax("logits", S)[range(TOKENS), LABELS.numpy()]).mean())


def mse(ours: str, theirs: str) -> float:
    return float(((S[ours] - T[theirs]).double() ** 2).mean())


def relation(name: str, heads: int, teacher_layer: int) -> float:
    sides = []
    for side, layer in ((S, STUDENT_LAYERS), (T, teacher_layer)):
        x = side[f"{name}.{layer}"][0].double().numpy()
        joined = np.concatenate(list(x), -1)
        parts = np.split(joined, heads, -1)
        sides.append(np.stack([scipy.special.softmax(p @ p.T / math.sqrt(p.shape[1]), -1) for p in parts]))
    return float(scipy.special.rel_entr(sides[1], sides[0]).sum(-1).mean())


def rows(name: str, **options: object) -> tuple[Match, ...]:
    check_options(options, METHODS[name].options(), "method")
    return METHODS[name].function(**options)


def test_kd() -> None:
    assert total(rows("kd", temperature=4.0, soft=0.7, hard=0.3)) == pytest.approx(0.7 * kl(4) + 0.3 * ce(), rel=1e-5)
    assert total(rows("kd")) == pytest.approx(0.5 * kl(1) + 0.5 * ce(), rel=1e-5)
    soft_only = rows("kd", soft=1.0, hard=0.0, loss="soft_ce", temperature=2.0)
    assert total(soft_only) == pytest.approx(soft_ce(2), rel=1e-5)
    assert all(row.target == "teacher" for row in soft_only)


def test_distilbert() -> None:
    s, t = S["hidden.2"][0].double().numpy(), T["hidden.4"][0].double().numpy()
    cosines = (s * t).sum(-1) / np.linalg.norm(s, axis=-1) / np.linalg.norm(t, axis=-1)
    wanted = 5 * kl(2) + 2 * ce() + 1 * (1 - cosines.mean())
    assert total(rows("distilbert")) == pytest.approx(wanted, rel=1e-5)


def test_distilbert_scores_the_targets_and_weights_every_teacher_row() -> None:
    # A row summed over teachers beside a row averaged over them would change the paper's 5 : 2 : 1.
    assert all(row.positions != "all" for row in rows("distilbert"))
    assert all(row.weighted for row in rows("distilbert"))


def test_tinybert() -> None:
    wanted = mse("hidden.0", "hidden.0")
    for s, t in ((1, 2), (2, 4)):
        wanted += mse(f"hidden.{s}", f"hidden.{t}") + mse(f"scores.{s}", f"scores.{t}")
    assert total(rows("tinybert")) == pytest.approx(wanted, rel=1e-5)
    prediction = rows("tinybert", step="prediction")
    assert total(prediction) == pytest.approx(soft_ce(1), rel=1e-5)
    assert [row.target for row in prediction] == ["teacher"]
    with pytest.raises(ValueError, match="'layers' or 'prediction'"):
        rows("tinybert", step="third")
    assert METHODS["tinybert"].must_be_equal == ("heads",)


@pytest.mark.parametrize(("heads", "layer"), [(2, 0), (3, 0), (6, 3)])
def test_minilmv2(heads: int, layer: int) -> None:
    wanted = sum(relation(name, heads, layer or TEACHER_LAYERS) for name in ("query", "key", "value"))
    assert total(rows("minilmv2", heads=heads, teacher_layer=layer)) == pytest.approx(wanted, rel=1e-5)


def test_mt_bert() -> None:
    layers = mse("hidden.1", "hidden.2") + mse("hidden.2", "hidden.4")
    found = rows("mt_bert", temperature=2.0, soft=0.5, hidden=3.0, hard=0.25)
    assert total(found) == pytest.approx(0.5 * soft_ce(2) + 3 * layers + 0.25 * ce(), rel=1e-5)
    hidden = next(row for row in found if row.feature == "hidden")
    assert (hidden.weighted, hidden.projection) == (False, "per_layer")
    assert all(row.weighted for row in found if row.feature != "hidden")
    assert len(rows("mt_bert", hidden=0.0, hard=0.0)) == 1


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_is_a_few_rows_with_a_source(name: str) -> None:
    spec = METHODS[name]
    assert 1 <= len(spec.function()) <= 8
    assert "arXiv" in spec.source
    assert spec.stages
    for row in spec.function():
        assert row.loss in LOSSES
