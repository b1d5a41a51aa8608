"""GLMD's claim, soft labels are all you need, and the deck's best mix, on texts that are new to the teacher.

One teacher of six layers with 1,500 labelled texts; 3-layer students on 3,000 further texts with labels, so that
mixes with a hard label lose nothing. Methods with a step of layers spend half of their steps on it.
"""

from __future__ import annotations

import random
from typing import Any

from sides.compare import difference

from proofs.proof import Found, Proof, mean
from proofs.setting import Group, Setting, Stage

LABELLED, TRANSFER = 1_500, 3_000
STEPS, STUDENT, TEACHER_STEPS, TEACHER = 160, 3, 200, 6
WHOLE: dict[str, Any] = {
    "kd T=1": {"name": "kd"},
    "distilbert": "distilbert",
    "pkd": "pkd",
    "mt_bert": "mt_bert",
    "glmd (soft labels alone)": {"name": "glmd", "options": {"step": "prediction"}},
}
HALVES = ("tinybert", "mixbaseline", "best_mix")


def groups(setting: Setting, seed: int) -> list[Group]:
    rows = list(setting.texts.train)
    random.Random(seed).shuffle(rows)
    own, more = rows[:LABELLED], rows[LABELLED : LABELLED + TRANSFER]
    data = {name: setting.block(setting.write(name, each, seed)) for name, each in (("own", own), ("more", more))}
    taught = Group("teachers", {"own": data["own"]}, {"teacher": setting.labels("own", TEACHER_STEPS, TEACHER)})
    teacher = [{"name": "teacher", "model": setting.export("teachers", seed, 1, "teacher")}]

    def of(steps: int, **values: Any) -> Stage:
        return setting.distil("more", steps, STUDENT, teacher, **values)

    stages: dict[str, Stage] = {"labels": setting.labels("more", STEPS, STUDENT)}
    arms = {"labels alone": "labels"}
    for number, (arm, method) in enumerate(WHOLE.items()):
        stages[f"whole{number}"], arms[arm] = of(STEPS, method=method), f"whole{number}"
    for name in HALVES:
        layers, last = ({"name": name, "options": {"step": step}} for step in ("fine-tune", "prediction"))
        stages[f"{name}-layers"] = of(STEPS // 2, method=layers)
        stages[name] = of(STEPS // 2, method=last, student=f"stage:{name}-layers")
        arms[name] = name
    return [taught, Group("students", {"more": data["more"]}, stages, arms, needs=("teachers",))]


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """Whether soft labels alone, or the best mix, are above every other arm."""
    lines = []
    for name in ("glmd (soft labels alone)", "best_mix"):
        others = [other for other in arms if other != name]
        if name in arms and others:
            best = max(others, key=lambda other: mean(arms, other) or 0.0)
            gain = difference(arms[name], arms[best])
            if gain is not None:
                lines.append(f"{name} against the best other arm, {best}: {gain.text}, p = {gain.p:.4f}")
    return lines


PROOF = Proof(groups, ("labels alone", "kd T=1"), ("banking77", "trec"), 5, notes=notes)
