"""Laws of calibration: the temperature that labels were drawn at is found, and every number is that of the formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from mtkd.evaluate.calibration import (
    COLDEST,
    HOTTEST,
    Observed,
    fit_temperature,
    fit_with_bias,
    knows,
    observe,
    quality,
)
from mtkd.models.classes import LOW


def drawn(temperature: float, count: int = 4000, classes: int = 20, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits of a teacher whose best temperature is known: its labels are drawn from softmax(logits / temperature)."""
    chance = torch.Generator().manual_seed(int(100 * temperature))
    logits = scale * temperature * torch.randn(count, classes, generator=chance, dtype=torch.float64)
    labels = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=chance)[:, 0]
    return logits, labels


def cross_entropy(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Written out: mean of -log softmax(logits / temperature) at the label."""
    return -float(torch.log_softmax(logits / temperature, -1).gather(-1, labels[:, None]).mean())


@pytest.mark.parametrize("temperature", [0.2, 0.38, 1.0, 2.5, 6.0])
def test_the_temperature_that_labels_were_drawn_at_is_found(temperature: float) -> None:
    """Law: maximum likelihood is consistent (4,000 labels: 5%), and equals a search over the whole loss (1e-4)."""
    logits, labels = drawn(temperature)
    found = fit_temperature(observe(logits, labels))
    assert found == pytest.approx(temperature, rel=0.05)
    searched = minimize_scalar(
        lambda s: cross_entropy(logits, labels, math.exp(s)),
        bounds=(-3, 2.7),
        method="bounded",
        options={"xatol": 1e-9},
    )
    assert found == pytest.approx(math.exp(searched.x), rel=1e-4)


@pytest.mark.parametrize("temperature", [0.05, 0.33, 0.5, 1.0, 3.7, 15.0])
def test_what_is_measured_between_the_nodes_is_the_formula(temperature: float) -> None:
    """Law: cross entropy, mean confidence and accuracy at any temperature are those of the whole logits."""
    logits, labels = drawn(0.7, count=500)
    measured = quality(observe(logits, labels), temperature)
    probs = torch.softmax(logits / temperature, -1)
    assert measured["cross_entropy"] == pytest.approx(cross_entropy(logits, labels, temperature), abs=1e-5)
    assert measured["confidence"] == pytest.approx(float(probs.max(-1).values.mean()), abs=1e-5)
    assert measured["accuracy"] == float((probs.argmax(-1) == labels).double().mean())
    assert sum(count for *_, count in measured["bins"]) == 500


def test_the_calibration_error_is_that_of_the_bins() -> None:
    """Law: a teacher that says 0.9 and is right in half of the cases has an error of 0.4; one that is honest, none."""
    logits = torch.log(torch.tensor([[0.9, 0.1]], dtype=torch.float64)).repeat(10, 1)
    half, honest = torch.tensor([0, 1] * 5), torch.tensor([0] * 9 + [1])
    assert quality(observe(logits, half), 1.0)["ece"] == pytest.approx(0.4)
    assert quality(observe(logits, honest), 1.0)["ece"] == pytest.approx(0.0, abs=1e-12)
    (only,) = quality(observe(logits, honest), 1.0)["bins"]
    assert only == pytest.approx([0.9, 0.9, 10])


def test_parts_are_the_whole() -> None:
    """Law: tiles and ranks add up: the pieces of a pass fit what the whole of it fits."""
    logits, labels = drawn(0.5, count=300)
    parts = [observe(logits[i : i + 70], labels[i : i + 70]) for i in range(0, 300, 70)]
    assert fit_temperature(Observed.joined(parts)) == pytest.approx(fit_temperature(observe(logits, labels)), rel=1e-12)


def test_a_teacher_without_a_best_temperature_gets_the_end_of_the_range() -> None:
    """Law: right on every label, the loss falls for ever as the temperature falls; wrong on all, as it rises."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    assert fit_temperature(observe(logits, torch.tensor([0, 1]))) == COLDEST
    assert fit_temperature(observe(logits, torch.tensor([1, 0]))) == HOTTEST


def test_columns_without_a_chance_do_no_harm_and_others_are_refused() -> None:
    """Law: a column of -inf counts as if it were not there; NaN is an error."""
    logits, labels = drawn(0.5, count=100)
    wider = torch.cat([logits, torch.full((100, 3), -torch.inf)], -1)
    assert fit_temperature(observe(wider, labels)) == pytest.approx(fit_temperature(observe(logits, labels)), rel=1e-12)
    logits[3, 4] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        observe(logits, labels)


def test_a_specialist_is_not_asked_about_classes_that_it_does_not_know() -> None:
    """Law: labels of classes without an output are left out; all others stay, however wrong the teacher is."""
    rows = torch.tensor([[0.0, 40.0, -LOW], [0.0, 40.0, -LOW], [3.0, 1.0, -LOW]])
    assert knows(rows, torch.tensor([2, 0, 1])).tolist() == [False, True, True]


def test_a_bias_per_class_is_found() -> None:
    """Law: shifted logits get their shift back, up to a constant; a class without a label gets a finite bias."""
    logits, labels = drawn(1.0, classes=4)
    shift = torch.tensor([1.5, -1.0, 0.0, -0.5], dtype=torch.float64)
    found = fit_with_bias((2 * (logits - shift)).numpy(), labels.numpy())
    assert found.temperature == pytest.approx(2.0, rel=0.05)
    assert np.array(found.bias) - np.mean(found.bias) == pytest.approx((shift - shift.mean()).numpy(), abs=0.15)
    some = labels != 3
    without = fit_with_bias(logits[some].numpy(), labels[some].numpy())
    assert -20 < without.bias[3] < -1


def test_the_bias_is_a_stationary_point_of_the_formula() -> None:
    """Law: the gradient of cross entropy plus prior, written out with autograd, is 0 at what is found."""
    logits, labels = drawn(0.6, count=200, classes=5)
    found = fit_with_bias(logits.numpy(), labels.numpy())
    parameters = torch.tensor([math.log(found.temperature), *found.bias], dtype=torch.float64, requires_grad=True)
    scaled = logits * torch.exp(-parameters[0]) + parameters[1:]
    loss = torch.nn.functional.cross_entropy(scaled, labels) + parameters[1:].square().sum() / (2 * len(labels))
    (gradient,) = torch.autograd.grad(loss, parameters)
    assert float(gradient.abs().max()) < 1e-5
