"""Every weighting within an objective: one teacher, the order of teachers, learning rates of their own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_weighting_engines import LENGTHS, Stage
from tiny import CPU, class_batch, classifier, make_objective
from torch import Tensor

from mtkd.config import Named, OptimizerConfig
from mtkd.config.match import Match
from mtkd.engine.base import parameter_groups
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import UserError
from mtkd.methods.papers import kd
from mtkd.objective.looks import before_step
from mtkd.running.train import global_counts
from mtkd.weightings import StageFacts
from mtkd.weightings.make import make_weighting
from mtkd.weightings.spec import WEIGHTINGS

ROWS = [*kd(temperature=2.0).values(), Match(feature="hidden", loss="mse")]
SHAPES = {"a": (8, 1), "b": (24, 2), "c": (16, 1)}


def loss_and_gradient(weighting: str, order: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Of one step with the teachers in this order."""
    needed = {"fixed": {"weights": {name: 1.0 + "abc".index(name) for name in order}}, "exopd": {"reference": "b"}}
    options = needed.get(weighting, {})
    teachers = [classifier(*SHAPES[name], seed=ord(name)) for name in order]
    named = Named(name=weighting, options=options)
    objective, pool = make_objective(classifier(16, 2, 0), teachers, ROWS, named, names=order)
    generator = torch.Generator().manual_seed(1)
    for key, adapter in objective.projections.items():  # drawn by place otherwise
        name = order[int(key.split("teacher")[1])]
        adapter.weight.data = torch.randn(adapter.weight.shape, generator=generator.manual_seed(ord(name)))
    stage = Stage(objective, pool, TorchEngine(objective, OptimizerConfig(), 4, CPU))
    batch = class_batch(LENGTHS)
    batch.routes = torch.tensor([order.index("abc"[i % len(order)]) for i in range(len(LENGTHS))])
    counts, _ = global_counts([batch], stage.engine.dist, more=objective.weighting.counts)
    ((batch, features),) = before_step(stage.objective, stage.pool, stage.engine, 3, [batch], counts)
    loss, _ = objective(batch, features, counts)
    loss.backward()
    student = [p.grad.reshape(-1) for p in objective.student.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(student)


@pytest.mark.parametrize("name", [n for n, spec in WEIGHTINGS.items() if spec.sums_to_one])
def test_one_teacher_is_the_single_teacher_path_bit_by_bit(name: str) -> None:
    """With one teacher a weighting of sum 1 gives the loss and gradients of uniform weights."""
    for found, wanted in zip(loss_and_gradient(name, ("a",)), loss_and_gradient("uniform", ("a",)), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", [n for n in WEIGHTINGS if n != "posterior"])  # of texts; test_posterior has its order
def test_the_order_of_teachers_changes_nothing(name: str) -> None:
    """Teachers in another order give the same loss and gradients."""
    (loss, gradient), (other, another) = (
        loss_and_gradient(name, order) for order in (("a", "b", "c"), ("c", "a", "b"))
    )
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(another, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_a_weighting_that_reads_what_nothing_provides_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A declared name must be a trait or a fact."""
    monkeypatch.setitem(WEIGHTINGS._values, "route", replace(WEIGHTINGS["route"], asks=("rout",)))
    with pytest.raises(UserError, match="reads what nothing provides"):
        make_weighting(Named(name="route"), StageFacts.stand_in(("a",)), "here")


def test_a_weightings_parameters_have_their_own_learning_rate() -> None:
    """`lr` sets the peak of the weighting's parameters, on the stage's schedule and without weight decay."""
    named = Named(name="learned", options={"gate": "pooled", "lr": 0.3})
    objective, _ = make_objective(classifier(16, 1, 0), [classifier(8, 1, 1)] * 2, ROWS[:2], named)
    config = OptimizerConfig(lr=0.01, weight_decay=0.5, warmup=0.0, schedule="linear")
    groups = parameter_groups(objective, config)
    own = {id(p) for p in objective.weighting.parameters()}
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(0.5, 1.0), (0.0, 1.0), (0.0, 30.0)]
    assert {id(p) for p in groups[2]["params"]} == own
    assert sum(len(g["params"]) for g in groups) == len(list(objective.parameters()))
    engine = TorchEngine(objective, config, 4, CPU)
    for parameter in objective.parameters():
        parameter.grad = torch.ones_like(parameter) / 1000
    engine.step(2)  # half of the linear schedule is left
    assert [g["lr"] for g in engine.optimizer.param_groups] == pytest.approx([0.005, 0.005, 0.15])
