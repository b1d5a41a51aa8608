"""Three teachers of unequal quality, labelled texts that are new to all: do weightings find the good one?

Heads on frozen embeddings (`proofs.heads`): "good" has 4,000 labelled texts, "few" 200, "noisy" 2,000 of which 30% have
the label of another class. Students see 3,000 further texts; weightings that read labels may read those of all. The
oracle takes the teacher that gives the label the largest probability, text by text.
"""

from __future__ import annotations

import random
import statistics
from typing import Any

import numpy as np
from sides.compare import difference

from proofs.corpora import Row
from proofs.heads import Head, answers, teacher
from proofs.proof import Found, Proof, best_of, mean, weights_over_time
from proofs.setting import HARD, SOFT, Group, Setting, Stage, group_of

SIZES = {"good": 4_000, "few": 200, "noisy": 2_000}
FLIPPED, TRANSFER = 0.3, 3_000
STEPS, STUDENT = 120, 2  # layers
WEIGHTINGS: dict[str, Any] = {
    "uniform": "uniform",
    "confidence": "confidence",
    "entropy": "entropy",
    "ca_mkd": "ca_mkd",
    "mt_bert": {"name": "mt_bert", "options": {"normalise": True}},
    "learned": "learned",
    "learned, gated": {"name": "learned", "options": {"gate": "pooled"}},
    "rl_kd": "rl_kd",
}
SHOWN = ("ca_mkd", "mt_bert", "learned", "learned, gated", "rl_kd")


def cut(setting: Setting, seed: int) -> dict[str, list[Row]]:
    """The rows of each teacher and of the transfer set."""
    draw = random.Random(seed)
    rows = list(setting.texts.train)
    draw.shuffle(rows)
    made: dict[str, list[Row]] = {}
    for name, count in (*SIZES.items(), ("transfer", TRANSFER)):
        made[name], rows = rows[:count], rows[count:]
    for number in range(round(FLIPPED * len(made["noisy"]))):
        row = made["noisy"][number]
        others = [name for name in setting.texts.classes if name != row["label"]]
        made["noisy"][number] = {**row, "label": draw.choice(others)}
    return made


def groups(setting: Setting, seed: int) -> list[Group]:
    rows = cut(setting, seed)
    pool = [teacher(setting, name, Head(rows[name], seed * 10 + k), seed) for k, name in enumerate(SIZES)]
    column = {name: number for number, name in enumerate(setting.texts.classes)}
    truth = np.array([column[row["label"]] for row in rows["transfer"]])
    right = np.stack([_log_share(answers(setting, name, seed, rows["transfer"]), truth) for name in SIZES])
    best = [list(SIZES)[k] for k in right.argmax(0)]
    transfer = [{**row, "teacher": name} for row, name in zip(rows["transfer"], best, strict=True)]
    data = {"transfer": setting.block(setting.write("transfer", transfer, seed))}

    def of(teachers: list[dict[str, Any]], **values: Any) -> Stage:
        return setting.distil("transfer", STEPS, STUDENT, teachers, **values)

    alone = {f"{name} alone": of([pool[k]]) for k, name in enumerate(SIZES)}
    weighted = {name: of(pool, weighting=value) for name, value in WEIGHTINGS.items()}
    both: dict[str, Any] = {"match": [{**SOFT, "weight": 0.5}, {**HARD, "weight": 0.5}]}
    labelled = {"labels alone": setting.labels("transfer", STEPS, STUDENT), "good alone + labels": of(pool[:1], **both)}
    for name in ("uniform", "ca_mkd", "learned"):
        labelled[f"{name} + labels"] = of(pool, weighting=name, **both)
    return [
        group_of("alone", data, {**alone, "oracle": of(pool, weighting="route")}),
        group_of("weighted", data, weighted),
        group_of("labelled", data, labelled),
    ]


def _log_share(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Log-probability of the label, [rows]."""
    top = logits.max(1)
    return np.asarray(logits[np.arange(len(logits)), labels] - top - np.log(np.exp(logits - top[:, None]).sum(1)))


def derive(arms: Found) -> Found:
    return {**arms, "best teacher alone": best_of(arms, [f"{name} alone" for name in SIZES])}


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """Accuracy of the teachers, the weights at three times, and whether a student is above the good teacher's."""
    rows = cut(setting, 0)["transfer"]
    column = {name: number for number, name in enumerate(setting.texts.classes)}
    truth = np.array([column[row["label"]] for row in rows])
    right = [f"{name} {100 * (answers(setting, name, 0, rows).argmax(1) == truth).mean():.1f}%" for name in SIZES]
    lines = [f"teachers of seed 0 on the transfer texts: {', '.join(right)}"]
    for name in SHOWN:
        stage = f"arm{list(WEIGHTINGS).index(name)}"
        logged = [weights_over_time(setting, "weighted", stage, seed) for seed in range(seeds)]
        logged = [each for each in logged if each]
        if logged:
            times = (0, len(logged[0]) // 2, -1)
            at = [(each[0][0], {k: statistics.mean(run[t][1].get(k, 0.0) for run in logged) for k in SIZES})
                  for t in times for each in [[logged[0][t]]]]  # fmt: skip
            shown = "; ".join(f"step {s}: " + ", ".join(f"{k} {w:.2f}" for k, w in ws.items()) for s, ws in at)
            lines.append(f"mean weights under {name}: {shown}")
    weighted = [name for name in WEIGHTINGS if name in arms]
    if weighted and "good alone" in arms:
        best = max(weighted, key=lambda name: mean(arms, name) or 0.0)
        gain = difference(arms[best], arms["good alone"])
        if gain is not None:
            lines.append(f"best weighting {best} against the good teacher's student: {gain.text}, p = {gain.p:.4f}")
    return lines


PROOF = Proof(groups, ("good alone", "uniform"), ("banking77",), 5, derive, notes)
