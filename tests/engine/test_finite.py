"""Numbers that are not finite (F17): no step is made with them, nothing that holds them is sealed, no JSON has them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import processes
import pytest
import torch
from tiny import CPU, causal_batch, causal_model, make_objective, rows_of
from tiny_run import NAME, STUDENT_STEPS, tiny_config, write_yaml

import mtkd
from mtkd.config import OptimizerConfig
from mtkd.engine.base import all_finite
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.jsonlines import to_json
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.errors import NonFiniteError
from mtkd.methods.papers import kd
from mtkd.objective.objective import Objective
from mtkd.running.train import global_counts

OPTIMIZER = OptimizerConfig(lr=1e-2)
LENGTHS = [9, 3, 7, 1, 8, 2, 5, 6]


def objective_and_pool() -> tuple[Objective, Any]:
    return make_objective(causal_model(16, 2, 0), [causal_model(24, 2, 1)], list(kd().values()), "uniform")


def norm_of_a_step(kind: str, zero_stage: int, bad: tuple[int, int] | None) -> tuple[float, bool]:
    """(norm, whether the parameters are as they were) of a step of two micro-batches per rank.

    Args: bad: rank and micro-batch to whose loss a constant NaN is added: its gradient stays finite.
    """
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    objective, pool = objective_and_pool()
    engine: Any
    if kind == "deepspeed":
        engine = DeepSpeedEngine(objective, OPTIMIZER, 4, CPU, zero_stage=zero_stage, accumulate=2, dist=dist)
    else:
        engine = TorchEngine(objective, OPTIMIZER, 4, CPU)
    before = [p.detach().clone() for p in objective.parameters()]
    parts = dist.world_size * 2
    mine = [rows_of(causal_batch(LENGTHS), list(range(8))[dist.rank * 2 + m :: parts]) for m in range(2)]
    counts, _ = global_counts(mine, dist)
    for number, batch in enumerate(mine):
        loss, _ = engine.forward(batch, pool.forward(batch), counts)
        engine.backward(loss + math.nan if bad == (dist.rank, number) else loss)
    norm = engine.step(1)
    return norm, all(torch.equal(a, b) for a, b in zip(before, objective.parameters(), strict=True))


@pytest.mark.parametrize("number", [0, 1])
def test_a_step_with_a_loss_that_is_nan_leaves_the_parameters_alone(number: int) -> None:
    norm, unchanged = norm_of_a_step("torch", 0, None)
    assert (math.isfinite(norm), unchanged) == (True, False)
    norm, unchanged = norm_of_a_step("torch", 0, (0, number))
    assert (math.isfinite(norm), unchanged) == (False, True)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_every_rank_learns_of_a_loss_that_is_nan_on_one(zero_stage: int) -> None:
    """DeepSpeed's own norm of a gradient that is NaN is -1, which looks finite."""
    for rank, norm in enumerate(run_distributed(partial(norm_of_a_step, "deepspeed", zero_stage, (1, 0)), 2)):
        assert not math.isfinite(norm[0]), rank


@pytest.mark.parametrize(
    "harm",
    [
        lambda o: next(o.student.parameters()).data.view(-1)[:1].fill_(math.inf),
        lambda o: o.weighting.register_buffer("kept", torch.tensor(math.nan)),
    ],
    ids=["a parameter", "a weighting's memory"],
)
def test_a_number_that_is_not_finite_is_found_before_a_seal(harm: Callable[[Objective], object]) -> None:
    objective, _ = objective_and_pool()
    assert all_finite(objective)
    harm(objective)
    assert not all_finite(objective)


def test_parameters_that_overflow_are_not_sealed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update of step 2 makes a parameter infinite, with a finite loss and gradient: step 1 stays the newest."""
    step = TorchEngine.step

    def overflow(engine: TorchEngine, number: int) -> float:
        norm = step(engine, number)
        if number == 1:
            next(iter(engine.objective.parameters())).data.view(-1)[0] = math.inf
        return norm

    monkeypatch.setattr(TorchEngine, "step", overflow)
    config = tiny_config(tmp_path, stages={"teacher": {"save_every": 1}, "student": None}, evaluate=None)
    with pytest.raises(NonFiniteError, match="not finite at step 2") as caught:
        mtkd.run(config)
    assert caught.value.found == "a parameter"
    checkpoints = tmp_path / "runs" / NAME / "stages/01-teacher/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000001"]


NAN_ONCE = '''
import mtkd
from pathlib import Path

seen = []

@mtkd.loss("nan_once", inputs=("logits",))
def nan_once(student, teacher, mask):
    """NaN in the fourth call, while the file NAN is there; the gradient is finite."""
    seen.append(1)
    bad = Path(__file__).with_name("NAN").exists() and len(seen) == 4
    return ((student - teacher) ** 2).mean(-1) + (float("nan") if bad else 0.0)
'''


def no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")


def test_a_run_goes_on_from_its_last_good_checkpoint_once_the_cause_of_a_nan_is_removed(tmp_path: Path) -> None:
    """Saved every second step, logged every tenth: NaN at step 4 is seen at step 4, and step 2 is the newest."""
    (tmp_path / "nan.py").write_text(NAN_ONCE)
    (tmp_path / "NAN").touch()
    row = {"feature": "logits", "loss": "nan_once", "weight": 1.0}
    student = {"method": None, "match": [row], "save_every": 2}
    file = write_yaml(tmp_path, log_every=10, plugins=["nan.py"], stages={"student": student})
    processes.assert_refused(tmp_path, ("run", str(file)), 64, "not finite at step 4", "loss, row/")
    run = tmp_path / "runs" / NAME
    checkpoints = run / "stages/02-student/checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step-000002"]
    (tmp_path / "NAN").unlink()
    code, output = processes.run(tmp_path, "run", str(file))
    assert (code, "resumed at step 2" in output) == (0, True), output
    assert json.loads((run / "stages/02-student/DONE").read_text())["steps"] == STUDENT_STEPS
    for path in [*run.rglob("*.json"), *run.rglob("*.jsonl")]:
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=no_constant)


def test_json_has_null_for_what_is_not_finite() -> None:
    """JSON knows no NaN."""
    assert to_json({"a": [math.nan, (math.inf, 1.5)], "b": -math.inf}) == '{"a": [null, [null, 1.5]], "b": null}'
