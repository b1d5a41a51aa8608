"""A large gap: direct, TAKD, DGKD, on texts that are new to the teacher, at equal steps and at equal total time.

A 7-layer teacher with 1,500 labelled texts, a 2-layer student (one layer of the encoder and the averaging one) on 5,000
unlabelled texts. "Equal time" gives the direct student, or its labels, as many seconds as the whole chain has.
"""

from __future__ import annotations

import random
from typing import Any

from proofs.proof import Proof
from proofs.setting import Group, Setting, Stage

LABELLED, TRANSFER = 1_500, 5_000
STEPS, TEACHER_STEPS, TEACHER = 150, 200, 7
RUNGS = (4, 3)
COST = {2: 1.0, 3: 1.4, 4: 1.9}
"""Seconds of a step by layers, in those of a step of two: measured on one core."""


def groups(setting: Setting, seed: int) -> list[Group]:
    rows = list(setting.texts.train)
    random.Random(seed).shuffle(rows)
    more = [{"text": row["text"], "label": ""} for row in rows[LABELLED : LABELLED + TRANSFER]]
    data = {"own": setting.block(setting.write("own", rows[:LABELLED], seed))}
    transfer = {"transfer": setting.block(setting.write("transfer", more, seed))}
    taught = Group("teachers", data, {"teacher": setting.labels("own", TEACHER_STEPS, TEACHER)})
    known = [{"name": "teacher", "model": setting.export("teachers", seed, 1, "teacher")}]
    cache = {"kind": "cache", "data": "transfer", "teachers": known, "batch": {"tokens": 2_048}}
    teacher = setting.cached("cache", seed, 1, "teacher")

    def of(layers: int, teachers: list[dict[str, Any]], steps: int = STEPS, **values: Any) -> Stage:
        return setting.distil("transfer", steps, layers, teachers, **values)

    longer = round(STEPS * sum(COST[layers] for layers in (*RUNGS, 2)))
    stages: dict[str, Stage] = {
        "direct": of(2, [teacher]),
        "direct-longer": of(2, [teacher], longer),
        "rung4": of(4, [teacher]),
        "rung3": of(3, [_stage("rung4")]),
        "takd": of(2, [_stage("rung3")]),
        "dense3": of(3, [teacher, _stage("rung4")], weighting="drop"),
        "dgkd": of(2, [teacher, _stage("rung4"), _stage("dense3")], weighting="drop"),
    }
    arms = {"direct": "direct", "direct, the chain's time": "direct-longer", "takd 7-4-3-2": "takd", "dgkd": "dgkd"}
    alone = {"labels": setting.labels("own", STEPS, 2), "labels-longer": setting.labels("own", longer, 2)}
    return [
        taught,
        Group("cache", transfer, {"cache": cache}, needs=("teachers",)),
        Group("students", transfer, stages, arms, needs=("cache",)),
        Group("labels", data, alone, {"labels alone": "labels", "labels alone, the chain's time": "labels-longer"}),
    ]


def _stage(name: str) -> dict[str, Any]:
    return {"name": name, "model": f"stage:{name}"}


PROOF = Proof(groups, ("direct",), ("banking77", "trec"), 5)
