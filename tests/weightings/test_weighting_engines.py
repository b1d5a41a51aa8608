"""Weightings that look beyond a micro-batch make the same run however a step is cut, under both engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny import CPU, causal_batch, causal_model, class_batch, classifier, make_objective, rows_of

from mtkd.config import Named, OptimizerConfig
from mtkd.config.match import Match
from mtkd.data.batch import Batch
from mtkd.engine.base import Engine
from mtkd.engine.deepspeed_engine import DeepSpeedEngine, init_distributed
from mtkd.engine.dist import Dist
from mtkd.engine.testing import run_distributed
from mtkd.engine.torch_engine import TorchEngine
from mtkd.methods.papers import kd
from mtkd.objective.looks import after_step, before_step
from mtkd.objective.objective import Objective
from mtkd.pool import TeacherPool
from mtkd.running.train import global_counts

LENGTHS = [9, 3, 7, 1, 8, 2, 5, 6]
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup=0.5, clip=0.5)
STEPS = 4
ROWS = [*kd(temperature=2.0).values(), Match(feature="hidden", loss="mse")]

CLASSES, TOKENS = "classes", "tokens"
CASES = [
    (Named(name="learned", options={"anchor_share": 0.5, "entropy": 0.1}), CLASSES, "example"),
    (Named(name="learned", options={"anchor_share": 0.5, "gate": "pooled"}), CLASSES, "example"),
    (Named(name="learned", options={"anchor_share": 0.5}), TOKENS, "token"),
    (Named(name="ae_kd", options={"c": 0.8}), TOKENS, "token"),
    (Named(name="mgda"), CLASSES, "example"),
    (Named(name="rl_kd"), CLASSES, "example"),
    (Named(name="rl_kd"), TOKENS, "example"),
    (Named(name="drop"), CLASSES, "example"),
    (Named(name="uncertainty"), TOKENS, "token"),
    (Named(name="uncertainty", options={"mode": "hard"}), CLASSES, "example"),
    (Named(name="route"), CLASSES, "example"),
    (Named(name="margin"), TOKENS, "token"),
    (Named(name="posterior"), TOKENS, "token"),
]
STATEFUL = (1, 5)  # numbers of cases
# By ZeRO stage. 3 cuts parameters and gradients: the cases that have some of their own, or read them.
SHARDED = {0: (3, 7, 8, 12), 2: (5,), 3: (1, 2, 3, 5)}
NAMES = [f"{named.name}-{task}-{i}" for i, (named, task, _) in enumerate(CASES)]


@dataclass
class Stage:
    """As much of a built stage as a step needs."""

    objective: Objective
    pool: TeacherPool
    engine: Engine


def stage_of(named: Named, task: str, per: str, kind: str, zero_stage: int, accumulate: int, dist: Dist) -> Stage:
    make = classifier if task == CLASSES else causal_model
    teachers = [make(width, layers, seed) for width, layers, seed in ((8, 1, 1), (24, 2, 2), (32, 1, 3))]
    objective, pool = make_objective(make(16, 2, 0), teachers, ROWS, named, per)
    if kind == "torch":
        return Stage(objective, pool, TorchEngine(objective, OPTIMIZER, STEPS, CPU))
    settings = {"zero_stage": zero_stage, "accumulate": accumulate, "dist": dist}
    return Stage(objective, pool, DeepSpeedEngine(objective, OPTIMIZER, STEPS, CPU, **settings))


def step_batch(task: str, step: int) -> Batch:
    """The whole batch of a step; the same examples come again, so that a policy can learn."""
    batch = class_batch(LENGTHS, seed=step % 2) if task == CLASSES else causal_batch(LENGTHS, seed=step % 2, prompt=1)
    batch.routes = torch.arange(len(LENGTHS)) % 3
    return batch


def take_step(stage: Stage, step: int, micro_batches: list[Batch]) -> dict[str, float]:
    """One optimizer step as the loop does it; the step's metrics over all ranks."""
    dist = stage.engine.dist
    counts, _ = global_counts(micro_batches, dist, more=stage.objective.weighting.counts)
    sums: dict[str, float] = {}
    for batch, teachers in before_step(stage.objective, stage.pool, stage.engine, step, micro_batches, counts):
        loss, metrics = stage.engine.forward(batch, teachers, counts)
        stage.engine.backward(loss)
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    stage.engine.step(step)
    after_step(stage.objective, stage.engine, micro_batches)
    return dict(zip(sums, dist.sum(list(sums.values())), strict=True))


def trajectory(case: int, kind: str = "torch", zero_stage: int = 0, accumulate: int = 1) -> list[dict[str, float]]:
    """The metrics of every step; the last one's weights depend on everything the weighting has learned."""
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    stage = stage_of(*CASES[case], kind, zero_stage, accumulate, dist)
    told = take_steps(stage, CASES[case][1], accumulate, range(STEPS))
    stage.engine.close()
    return told


def take_steps(stage: Stage, task: str, accumulate: int, steps: range) -> list[dict[str, float]]:
    """The metrics of each step."""
    dist, told = stage.engine.dist, []
    parts = dist.world_size * accumulate
    for step in steps:
        batch = step_batch(task, step)
        mine = [list(range(8))[dist.rank * accumulate + m :: parts] for m in range(accumulate)]
        if step == 2 and accumulate > 1:  # a rank, or a micro-batch, with nothing to do
            first = dist.rank == 0
            mine = [list(range(8)) if first and m == 0 else [] for m in range(accumulate)]
        told.append(take_step(stage, step, [rows_of(batch, rows) for rows in mine]))
    return told


def resumed(case: int, kind: str, zero_stage: int, folder: Path) -> tuple[list[dict[str, float]], ...]:
    """The metrics of the last two steps, undisturbed, and by a fresh stage that loads what was saved before them."""
    dist = init_distributed("cpu") if kind == "deepspeed" else Dist()
    place = folder / f"{case}-{kind}-{zero_stage}"
    place.mkdir(exist_ok=True)
    first, second = (stage_of(*CASES[case], kind, zero_stage, 2, dist) for _ in range(2))
    task = CASES[case][1]
    take_steps(first, task, 2, range(2))
    first.engine.save(place)
    dist.barrier()
    whole = take_steps(first, task, 2, range(2, STEPS))
    second.engine.load(place)
    again = take_steps(second, task, 2, range(2, STEPS))
    for stage in (first, second):
        stage.engine.close()
    return whole, again


def sharded(folder: Path) -> tuple[list[list[list[dict[str, float]]]], list[tuple[list[dict[str, float]], ...]]]:
    """Cases under ZeRO 0, 2 and 3 on this rank; and those with a state of their own, resumed."""
    runs = [[trajectory(case, "deepspeed", zero, 2) for case in cases] for zero, cases in SHARDED.items()]
    return runs, [resumed(case, "deepspeed", 3, folder) for case in STATEFUL]


def assert_same(found: list[dict[str, float]], wanted: list[dict[str, float]], where: str) -> None:
    for step, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=2e-5, abs=2e-6), f"{where}, step {step}: {name}"


@pytest.mark.parametrize("case", range(len(CASES)), ids=NAMES)
def test_accumulation_makes_the_same_run(case: int) -> None:
    """A step cut into micro-batches is the same step."""
    wanted = trajectory(case)
    for accumulate in (2, 8):
        assert_same(trajectory(case, accumulate=accumulate), wanted, f"{NAMES[case]} x {accumulate}")


def test_trained_weights_move_and_others_differ() -> None:
    """The runs above compare something: weights that were learned are no longer uniform."""
    for case in (0, 1, 2):
        last = trajectory(case)[-1]
        assert max(abs(last[f"weight/t{k}"] - 1 / 3) for k in range(3)) > 1e-3, NAMES[case]
    rewarded = trajectory(5)
    assert rewarded[0]["penalty"] == rewarded[1]["penalty"] == 0.0  # the first reward only sets the baseline
    assert rewarded[2]["penalty"] == 0.0  # the policy is still 0: its product with the gradient, not its gradient
    assert rewarded[3]["penalty"] != 0.0


@pytest.mark.parametrize("case", STATEFUL)
def test_a_resumed_run_is_bit_equal(case: int, tmp_path: Path) -> None:
    """Saved and loaded in the middle, a run ends with the same bits."""
    whole, again = resumed(case, "torch", 0, tmp_path)
    assert whole == again
    assert whole[-1]["penalty"] != 0.0


@pytest.mark.slow
def test_two_deepspeed_ranks_make_the_same_run(tmp_path: Path) -> None:
    """Under ZeRO 0, 2 and 3, to rounding; and a resumed one bit by bit."""
    ranks = run_distributed(sharded, 2, tmp_path, timeout=1200)
    wanted = {case: trajectory(case) for case in {case for cases in SHARDED.values() for case in cases}}
    for runs, resumes in ranks:
        assert all(whole == again for whole, again in resumes)
        for (zero, cases), told in zip(SHARDED.items(), runs, strict=True):
            for case, found in zip(cases, told, strict=True):
                assert_same(found, wanted[case], f"{NAMES[case]}, ZeRO {zero}")
