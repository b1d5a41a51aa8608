"""Flat teachers, and what becomes of methods, weightings and ensembles when they are calibrated first.

Three heads on frozen embeddings (`proofs.heads`) have 1,500 labelled texts each and too few steps: they are right and
say so with small probabilities. Students see 5,003 texts that are new to the teachers, without labels; 500 further
labelled texts fit a temperature per teacher. Of each seed differ: all texts, the heads, the students.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from proofs.corpora import Row
from proofs.heads import Head, answers, teacher
from proofs.proof import Found, Proof, best_of
from proofs.setting import SOFT, Group, Setting, Stage, group_of

TEACHERS = 3
LABELLED, HELD = 1_500, 500
HEAD_STEPS, HEAD_LR = 50, 2e-3
STEPS, STUDENT = 120, 2  # layers
FIT = {"data": "held", "split": "train", "examples": HELD}
WEIGHTINGS = ("confidence", "entropy", "margin", "mgda")


def cut(setting: Setting, seed: int) -> tuple[list[list[Row]], list[Row], list[Row]]:
    """The rows of the teachers, the held-out rows, the transfer rows."""
    rows = list(setting.texts.train)
    random.Random(seed).shuffle(rows)
    own = [rows[k * LABELLED : (k + 1) * LABELLED] for k in range(TEACHERS)]
    rest = rows[TEACHERS * LABELLED :]
    return own, rest[:HELD], rest[HELD:]


def _soft(loss: str = "kl", weight: float = 1.0, **options: Any) -> dict[str, Any]:
    return {"match": [{"feature": "logits", "loss": loss, "weight": weight, "options": options}]}


METHODS = {
    "dkd": _soft("dkd", temperature=1.0),
    "z-scores T=2": _soft(temperature=2.0, standardise=True),
    "dist": {"match": [*_soft("dist_inter", 2.0)["match"], *_soft("dist_intra", 2.0)["match"]]},
}


def groups(setting: Setting, seed: int) -> list[Group]:
    own, held, rest = cut(setting, seed)
    unlabelled = [{"text": row["text"], "label": ""} for row in rest]
    blocks = {"transfer": unlabelled, "held": held, "own": own[0], "true": rest}
    data = {name: setting.block(setting.write(name, rows, seed)) for name, rows in blocks.items()}
    flat = [
        teacher(setting, f"flat{k}", Head(rows, seed * 10 + k, HEAD_STEPS, HEAD_LR), seed) for k, rows in enumerate(own)
    ]
    fitted = [{**each, "calibrate": FIT} for each in flat]

    def of(teachers: list[dict[str, Any]], **values: Any) -> Stage:
        return setting.distil("transfer", STEPS, STUDENT, teachers, **values)

    raw = {f"one teacher, T={t:g}": of(flat[:1], **_soft(temperature=t)) for t in (2.0, 1.0, 0.5)}
    methods = {f"one teacher, {name}": of(flat[:1], **match) for name, match in METHODS.items()}
    one = {f"one teacher, calibrated, T={t:g}": of(fitted[:1], **_soft(temperature=t)) for t in (2.0, 1.0)}
    # A temperature changes no z-score.
    methods |= {f"one teacher, calibrated, {name}": of(fitted[:1], **METHODS[name]) for name in ("dkd", "dist")}
    one |= {f"teacher {k}, calibrated, T=1": of(fitted[k : k + 1]) for k in range(1, TEACHERS)}
    three = {"uniform, T=2": of(flat, **_soft(temperature=2.0)), "uniform, T=1": of(flat)}
    three |= {"confidence, T=1": of(flat, weighting="confidence")}
    several = {"uniform, calibrated": of(fitted)}
    for ensemble in ("probabilities", "logits"):
        several[f"uniform over {ensemble}, calibrated"] = of(fitted, match=[{**SOFT, "ensemble": ensemble}])
    several |= {f"{name}, calibrated": of(fitted, weighting=name) for name in WEIGHTINGS}
    transfer, both = {"transfer": data["transfer"]}, {name: data[name] for name in ("transfer", "held")}
    labels = {f"labels of {LABELLED:,} texts": setting.labels("own", STEPS, STUDENT)}
    true = {"true labels of the transfer texts (oracle)": setting.labels("true", STEPS, STUDENT)}
    return [
        group_of("own", {"own": data["own"]}, labels),
        group_of("raw", transfer, raw),
        group_of("one", both, one),
        group_of("three", transfer, three),
        group_of("several", both, several),
        group_of("methods", both, methods),
        group_of("true", {"true": data["true"]}, true),
    ]


def derive(arms: Found) -> Found:
    """With the best of the three calibrated teachers' students of each seed."""
    singles = ["one teacher, calibrated, T=1", *(f"teacher {k}, calibrated, T=1" for k in range(1, TEACHERS))]
    return {**arms, "best single teacher, calibrated, T=1": best_of(arms, singles)}


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature that makes labels most probable, by a grid of 1%."""
    grid = np.exp(np.arange(-3, 2, 0.01))
    losses = []
    for t in grid:
        z = logits / t
        top = z.max(1)
        losses.append(float((top + np.log(np.exp(z - top[:, None]).sum(1)) - z[np.arange(len(z)), labels]).mean()))
    return float(grid[int(np.argmin(losses))])


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """Each teacher's accuracy, mean confidence and fitted temperature, of the first seed."""
    _, held, rest = cut(setting, 0)
    number = {name: k for k, name in enumerate(setting.texts.classes)}
    lines = []
    for k in range(TEACHERS):
        new, fit = (answers(setting, f"flat{k}", 0, rows) for rows in (rest, held))
        fitted = temperature(fit, np.array([number[row["label"]] for row in held]))
        truth = np.array([number[row["label"]] for row in rest])
        before, after = (_confidence(new, t) for t in (1.0, fitted))
        lines.append(
            f"seed 0, teacher {k}: right on {100 * (new.argmax(1) == truth).mean():.1f}% of the transfer texts, mean "
            f"confidence {before:.2f}, at the fitted temperature of {fitted:.2f}: {after:.2f}"
        )
    return lines


def _confidence(logits: np.ndarray, temperature: float) -> float:
    z = logits / temperature
    shares = np.exp(z - z.max(1, keepdims=True))
    return float((shares.max(1) / shares.sum(1)).mean())


PROOF = Proof(groups, ("one teacher, T=2", "uniform, calibrated"), ("banking77",), 5, derive, notes)
