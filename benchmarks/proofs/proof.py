"""A proof: its groups of runs per seed, what is read of them, and the table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sides.compare import accuracies, table
from sides.jobs import hits, training_seconds

from proofs.setting import Group, Setting

Found = dict[str, dict[int, list[float]]]
"""Arm -> seed -> hits per test example."""


@dataclass(frozen=True)
class Proof:
    """A table.

    Attributes:
        groups: the runs of a seed, in the order in which they start.
        baselines: arms that the others are compared with.
        derive: adds arms that are made of others, such as the best single teacher of each seed.
        notes: lines below the table: goals met or missed.
    """

    groups: Callable[[Setting, int], list[Group]]
    baselines: Sequence[str]
    tasks: Sequence[str]
    seeds: int = 5
    derive: Callable[[Found], Found] = field(default=lambda found: found)
    notes: Callable[[Setting, Found, int], list[str]] = field(default=lambda setting, found, seeds: [])


def found(proof: Proof, setting: Setting, seeds: int) -> tuple[Found, dict[str, list[float]]]:
    """The hits of every finished arm, and the seconds of its stage's training per seed."""
    arms: Found = {}
    seconds: dict[str, list[float]] = {}
    for seed in range(seeds):
        for group in proof.groups(setting, seed):
            for arm, stage in group.arms.items():
                folder = setting.folder(group.name, seed)
                right, took = hits(folder, stage), training_seconds(folder, stage)
                if right is not None and took is not None:
                    arms.setdefault(arm, {})[seed] = right
                    seconds.setdefault(arm, []).append(took)
    return arms, seconds


def report(proof: Proof, setting: Setting, seeds: int) -> str:
    """The table of what is finished, and its notes."""
    arms, seconds = found(proof, setting, seeds)
    arms = proof.derive(arms)
    cost = {arm: f"{statistics.median(took):.0f}" for arm, took in seconds.items()}
    lines = [f"\n{setting.proof}, {setting.task}", "", table(arms, proof.baselines, {"s per run": cost}), ""]
    return "\n".join([*lines, *(f"- {note}" for note in proof.notes(setting, arms, seeds))])


def best_of(arms: Found, names: Sequence[str]) -> dict[int, list[float]]:
    """Of each seed the arm with the highest test accuracy: a baseline that no user could choose so well."""
    there = [arms[name] for name in names if name in arms]
    seeds = set.intersection(*(set(runs) for runs in there)) if there else set()
    return {seed: max((runs[seed] for runs in there), key=statistics.mean) for seed in sorted(seeds)}


def mean(arms: Found, name: str) -> float | None:
    """Mean accuracy of an arm, percent."""
    return statistics.mean(accuracies(arms[name])) if arms.get(name) else None


def weights_over_time(setting: Setting, group: str, stage: str, seed: int) -> list[tuple[int, dict[str, float]]]:
    """(step, {teacher: mean weight}) at every logged step of a stage."""
    file = setting.folder(group, seed) / "metrics.jsonl"
    rows = [json.loads(line) for line in file.open()] if file.exists() else []
    logged = [(row["step"], {k.removeprefix("weight/"): v for k, v in row.items() if k.startswith("weight/")})
              for row in rows if row.get("stage") == stage]  # fmt: skip
    return [(step, weights) for step, weights in logged if weights]
