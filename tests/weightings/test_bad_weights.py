"""Weightings and rows that teach nothing, or the opposite, are refused by name: in the plan, or at the first step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
import yaml
from tiny import causal_batch, causal_model, make_objective

import mtkd
from mtkd.config import RunConfig
from mtkd.config.match import Match
from mtkd.config.read import load_config
from mtkd.data.batch import position_counts
from mtkd.errors import UserError
from mtkd.weightings import FACTS, Traits, Weighting
from mtkd.weightings.faults import FAULTS, check_faults
from mtkd.weightings.spec import WEIGHTINGS, WeightingSpec
from mtkd.weightings.traits import Fact
from mtkd.weightings.trial import try_weighting

ROWS = (Match(loss="kl"),)


class Minus(Weighting):
    def forward(self, traits: Traits) -> torch.Tensor:
        return -torch.ones_like(traits.entropy)


class Nothing(Weighting):
    def forward(self, traits: Traits) -> torch.Tensor:
        return torch.zeros_like(traits.entropy)


class Undefined(Weighting):
    def forward(self, traits: Traits) -> torch.Tensor:
        return torch.zeros_like(traits.entropy) / 0


class Thresholded(Weighting):
    """0 for a teacher that is unsure; often of all of them."""

    def forward(self, traits: Traits) -> torch.Tensor:
        return (traits.confidence > 0.9).float()


class TwoClasses(Weighting):
    """Cannot be run on made-up teachers of another number of classes."""

    def forward(self, traits: Traits) -> torch.Tensor:
        assert traits.class_probabilities.shape[-1] == 2
        return traits.full(1.0)


def tried(weighting: Weighting, *, per: str, token_level: bool, negative: bool = False) -> None:
    """Refused by its weights on made-up teachers, as the plan does it."""
    trial = try_weighting(weighting, 2, per=per, token_level=token_level)
    check_faults(trial.faults, "mine", "here", negative=negative)


BAD = [(Minus, "negative weights"), (Nothing, "the weight 0"), (Undefined, "not numbers")]


@pytest.mark.parametrize(("cls", "message"), BAD)
@pytest.mark.parametrize("per", ["example", "token"])
def test_impossible_weights_are_seen_before_there_is_a_teacher(cls: type[Weighting], message: str, per: str) -> None:
    """Negative weights, NaN and 0 for every teacher are refused on made-up teachers."""
    for token_level in (True, False):
        with pytest.raises(UserError, match=f"'mine' gives .*{message}"):
            tried(cls(), per=per, token_level=token_level)


@pytest.mark.parametrize("cls", [Thresholded, TwoClasses])
def test_what_may_be_right_elsewhere_is_left_to_the_stage(cls: type[Weighting]) -> None:
    """A weighting that some made-up teachers defeat may be right on the stage's own."""
    tried(cls(), per="example", token_level=False)


def test_negative_weights_may_be_declared() -> None:
    """With `negative` the same weights pass."""
    tried(Minus(), per="token", token_level=True, negative=True)


@pytest.mark.parametrize(("cls", "message"), BAD)
@pytest.mark.parametrize("per", ["example", "token"])
def test_a_step_counts_the_faulty_positions(
    cls: type[Weighting], message: str, per: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The counts are of the positions where weights are read, and are what refuses them."""
    monkeypatch.setitem(WEIGHTINGS._values, "mine", WeightingSpec("mine", cls))
    objective, pool = make_objective(causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, ROWS, "mine", per=per)
    batch = causal_batch((7, 4), prompt=2)
    batch.keys[1] = -1  # a filler row counts nowhere
    _, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    found = {name: float(metrics[name]) for name in FAULTS}
    assert found["weight_fault/read"] == (5 if per == "token" else 1)
    with pytest.raises(UserError, match=message):
        check_faults(found, "mine", "here", negative=False)


def test_a_teacher_that_is_not_finite_is_not_the_weightings_fault() -> None:
    """Traits that are not finite make weights that are not: the loss shows it, the weighting is not blamed."""
    teachers = [causal_model(16, 1, 1), causal_model(16, 1, 2)]
    next(teachers[1].parameters()).data.fill_(float("nan"))
    objective, pool = make_objective(causal_model(16, 1, 0), teachers, ROWS, "entropy", per="token")
    batch = causal_batch((7, 4))
    _, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    assert metrics["loss"].isnan()
    check_faults({name: float(metrics[name]) for name in FAULTS}, "entropy", "here", negative=False)


def test_a_fact_that_is_not_finite_is_not_the_teachers_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's fact that is NaN for finite teachers makes weights that are not numbers: the weighting is refused."""

    class Reader(Weighting):
        def forward(self, traits: Traits) -> torch.Tensor:
            return traits.entropy + traits.read("undefined")

    fact = Fact(lambda traits: torch.full((), float("nan")))
    monkeypatch.setitem(FACTS, "undefined", fact)
    monkeypatch.setitem(WEIGHTINGS._values, "mine", WeightingSpec("mine", Reader))
    objective, pool = make_objective(causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, ROWS, "mine", per="token")
    batch = causal_batch((7, 4))
    _, metrics = objective(batch, pool.forward(batch), position_counts([batch]))
    with pytest.raises(UserError, match="weighting 'mine' gives weights that are not numbers"):
        check_faults({name: float(metrics[name]) for name in FAULTS}, "mine", "here", negative=False)


def test_weights_of_another_shape_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that lack an axis are refused with their shape."""

    class Flat(Weighting):
        def forward(self, traits: Traits) -> torch.Tensor:
            return traits.entropy[..., 0]

    monkeypatch.setitem(WEIGHTINGS._values, "flat", WeightingSpec("flat", Flat))
    objective, pool = make_objective(causal_model(16, 1, 0), [causal_model(16, 1, 1)] * 2, ROWS, "flat", per="token")
    batch = causal_batch((7, 4))
    with pytest.raises(UserError, match="weights of another shape"):
        objective(batch, pool.forward(batch), position_counts([batch]))


PLUGIN = """
import torch, mtkd
@mtkd.weighting("mine_{number}", sums_to_one=False)
class Mine(mtkd.Weighting):
    def forward(self, traits):
        made_up = int(traits.around.keys.max()) < 4
        return torch.full_like(traits.entropy, 0.5 if made_up else {value})
"""
"""Weights that are bad on the stage's own examples alone: the plan's four do not show it."""


def run_of(tmp_path: Path, plugin: str = "", **student: Any) -> RunConfig:
    """A teacher and its student; the student's stage is changed."""
    tiny_run.write_data(tmp_path / "data")
    values = tiny_run.tiny_values(tmp_path)
    values["stages"]["student"] |= student
    if plugin:
        (tmp_path / "mine.py").write_text(plugin)
        values["plugins"] = ["mine.py"]
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(path)


@pytest.mark.parametrize(
    ("number", "value", "message"),
    [
        (1, "-1.0", "negative weights"),
        (2, "0.0", "the weight 0"),
        (3, "float('nan')", "not numbers"),
    ],
)
def test_what_only_the_data_show_ends_the_first_step(number: int, value: str, message: str, tmp_path: Path) -> None:
    """By name, with exit code 2, and nothing is sealed."""
    config = run_of(tmp_path, PLUGIN.format(number=number, value=value), weighting=f"mine_{number}")
    with pytest.raises(UserError, match=message) as caught:
        mtkd.run(config)
    assert caught.value.where == "stages.student.weighting"
    assert f"mine_{number}" in str(caught.value)
    assert caught.value.exit_code == 2
    stage = config.folder / "stages" / "02-student"
    assert not (stage / "DONE").exists()
    assert not list(stage.glob("checkpoints/step-*"))
    lines = [json.loads(line) for line in (config.folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["stage"] != "student" for line in lines)
    assert not any(name in line for line in lines for name in FAULTS)


@pytest.mark.parametrize("count", [1, 2])
def test_a_stage_whose_rows_all_weigh_nothing_is_refused(count: int, tmp_path: Path) -> None:
    """A student must learn something: some row weighs more than 0."""
    match = [{"feature": "logits", "loss": "kl", "weight": 0.0}, {"loss": "ce", "target": "labels", "weight": 0.0}]
    with pytest.raises(UserError, match="every row weighs 0") as caught:
        mtkd.plan(run_of(tmp_path, method=None, match=match[:count]))
    assert caught.value.where == "stages.student.match"


@pytest.mark.parametrize("weights", [{"teacher": 0.0}, {"teacher": -1.0}, {"other": 1.0}])
def test_fixed_weights_that_teach_nothing_have_a_place(weights: dict[str, float], tmp_path: Path) -> None:
    """The message points at the option in the user's file."""
    with pytest.raises(UserError, match="fixed weights") as caught:
        mtkd.plan(run_of(tmp_path, weighting={"name": "fixed", "options": {"weights": weights}}))
    assert caught.value.where == "stages.student.weighting.options.weights"
