"""Hinton's question: how much of a ten-model ensemble's gain is kept by one model of the same shape.

Ten 3-layer models of different seeds learn the same 800 labelled texts (banking77: 1,500). One model of that shape is
distilled from them on all other texts of the corpus, without labels. The ten are made once; students differ by seed.
`share` is that of the ensemble's gain over a single model, mean of the ten.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

from sides.compare import accuracies
from sides.jobs import hits

from proofs.proof import Found, Proof, mean
from proofs.setting import SOFT, Group, Setting, Stage, group_of

MODELS, SHAPE = 10, 3  # layers
LABELLED = {"banking77": 1_500, "trec": 800, "sst2": 800}
MOST = 6_000  # transfer texts
STEPS = {"banking77": 150, "trec": 120, "sst2": 100}
TIMES = 3  # steps of the distilled models, per step of a single one
KEPT = 0  # seed under which what all students share is found
GOAL = 0.95


def groups(setting: Setting, seed: int) -> list[Group]:
    rows = list(setting.texts.train)
    random.Random(0).shuffle(rows)
    count = LABELLED[setting.task]
    own, more = rows[:count], [{"text": row["text"], "label": ""} for row in rows[count : count + MOST]]
    data = {"own": setting.block(setting.write("ensemble-own", own))}
    transfer = {"transfer": setting.block(setting.write("ensemble-transfer", more))}
    steps = STEPS[setting.task]
    made: list[Group] = []
    if seed == KEPT:
        ten = {f"single{k}": setting.labels("own", steps, SHAPE, seed=100 + k) for k in range(MODELS)}
        pool = [{"name": name, "model": f"stage:{name}"} for name in ten]
        cache = {"kind": "cache", "data": "transfer", "teachers": pool, "batch": {"tokens": 2_048}}
        # One run: mtkd refuses to score the ensemble of a run that has a cache alone.
        made.append(Group("teachers", {**data, **transfer}, {**ten, "cache": cache}, ensemble="cache"))
    kept = [setting.cached("teachers", KEPT, MODELS + 1, f"single{k}") for k in range(MODELS)]

    def of(ensemble: str, temperature: float, times: float, teachers: list[dict[str, Any]] | None = None) -> Stage:
        row = {**SOFT, "ensemble": ensemble, "options": {"temperature": temperature}}
        return setting.distil("transfer", round(times * steps), SHAPE, teachers or kept, match=[row])

    students = {
        "ten, probabilities, T=2": of("probabilities", 2.0, TIMES),
        "ten, probabilities, T=1": of("probabilities", 1.0, TIMES),
        "ten, probabilities, T=0.5": of("probabilities", 0.5, TIMES),
        "ten, logits, T=1": of("logits", 1.0, TIMES),
        "ten, probabilities, T=1, a third of the steps": of("probabilities", 1.0, 1),
        "one, T=1": of("losses", 1.0, TIMES, kept[:1]),
    }
    longer = {"labels, 3 x the steps": setting.labels("own", TIMES * steps, SHAPE)}
    return [*made, group_of("students", transfer, students, shared=("teachers",)), group_of("labels", data, longer)]


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """The share of the ensemble's gain that each student keeps."""
    single = [hits(setting.folder("teachers", KEPT), f"single{k}") for k in range(MODELS)]
    ensemble = hits(setting.folder("teachers", KEPT), "cache", "ensemble-scores.jsonl")
    if ensemble is None or any(each is None for each in single):
        return []
    low = statistics.mean(accuracies({k: each or [] for k, each in enumerate(single)}))
    high = accuracies({0: ensemble})[0]
    lines = [f"a single model {low:.2f} (mean of ten), their ensemble {high:.2f}"]
    for name in arms:
        share = ((mean(arms, name) or 0.0) - low) / (high - low)
        lines.append(f"{name}: {share:.0%} of the gain, goal {GOAL:.0%}: **{'met' if share >= GOAL else 'missed'}**")
    return lines


PROOF = Proof(groups, ("ten, probabilities, T=2",), ("banking77", "trec", "sst2"), 5, notes=notes)
