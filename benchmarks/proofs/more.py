"""When do more teachers help: 1, 2, 4, 8 teachers against how much they differ, and against the student's size.

Teachers are heads on frozen embeddings (`proofs.heads`), students are cut from the encoder and see 5,000 unlabelled
texts. The teachers of a setting have

    seeds     the same 1,000 labelled texts, and other seeds
    texts     1,000 labelled texts each, drawn by each for itself from 4,500
    few       154 labelled texts each (two per class), drawn in the same way
    half      texts of half of the classes each, drawn by each for itself
    eighth    texts of an eighth of the classes each: together they know all

Agreement is the share of 256 unlabelled texts for which two teachers choose the same class, mean over all pairs.
"""

from __future__ import annotations

import json
import random
import statistics
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import softmax
from sides.compare import difference

from proofs.corpora import Row
from proofs.heads import Head, answers, teacher
from proofs.proof import Found, Proof, mean
from proofs.setting import Group, Setting, Stage, group_of

TEACHERS = 8
COUNTS = (1, 2, 4, 8)
SETTINGS = {"seeds": "uniform", "texts": "uniform", "few": "uniform", "half": "confidence", "eighth": "confidence"}
"""Setting -> weighting: teachers that do not know all classes are weighted by their confidence."""
STEPS = 120
TAU = 0.1  # of the weights by confidence
SIZES = {2: COUNTS, 3: (1, 8)}
"""Layers of the student -> numbers of teachers."""
LABELLED, TRANSFER, SAMPLE = 4_500, 5_000, 256
PLOT = Path(__file__).parents[1] / "plots" / "more-teachers.svg"


def pools(setting: Setting, seed: int) -> tuple[list[Row], list[Row]]:
    """The rows that teachers draw their labelled texts from, and those of the transfer set."""
    rows = list(setting.texts.train)
    random.Random(seed).shuffle(rows)
    return rows[:LABELLED], rows[LABELLED : LABELLED + TRANSFER]


def labelled(setting: Setting, kind: str, seed: int, number: int) -> list[Row]:
    """The labelled texts of a teacher."""
    pool, _ = pools(setting, seed)
    own = random.Random(seed * 1_000 + number)
    if kind == "seeds":
        return pool[:1_000]
    if kind == "texts":
        return own.sample(pool, 1_000)
    if kind == "few":
        own.shuffle(pool)
        of_class = {name: [row for row in pool if row["label"] == name][:2] for name in setting.texts.classes}
        return [row for rows in of_class.values() for row in rows]
    classes = list(setting.texts.classes)
    if kind == "half":
        own.shuffle(classes)
        known = set(classes[: len(classes) // 2])
    else:
        random.Random(seed).shuffle(classes)
        known = set(classes[number::TEACHERS])
    return [row for row in pool if row["label"] in known]


def names(kind: str, seed: int) -> list[str]:
    return [f"{kind}{number}" for number in range(TEACHERS)]


def groups(setting: Setting, seed: int) -> list[Group]:
    _, rows = pools(setting, seed)
    unlabelled = [{"text": row["text"], "label": ""} for row in rows]
    data = {"transfer": setting.block(setting.write("transfer", unlabelled, seed))}
    made: list[Group] = []
    for kind, weighting in SETTINGS.items():
        pool = [
            teacher(setting, name, Head(labelled(setting, kind, seed, number), seed * 1_000 + number), seed)
            for number, name in enumerate(names(kind, seed))
        ]
        for layers, counts in SIZES.items():
            arms: dict[str, Stage] = {}
            for count in counts:
                values: dict[str, Any] = {"weighting": weighting} if count > 1 else {}
                arms[_arm(kind, layers, count)] = setting.distil("transfer", STEPS, layers, pool[:count], **values)
            made.append(group_of(f"{kind}-{layers}", data, arms))
    return sorted(made, key=lambda group: group.name.endswith("3"))  # the larger student last


def _arm(kind: str, layers: int, count: int) -> str:
    return f"{kind}, {layers} layers, {count} teacher{'s' * (count > 1)}"


def agreement(setting: Setting, kind: str, seed: int) -> tuple[float, float]:
    """Share of the same choices on 256 texts, mean over pairs of teachers; mean accuracy on them. Both 0 to 1."""
    _, rows = pools(setting, seed)
    sample = random.Random(seed).sample(rows, SAMPLE)
    truth = np.array([setting.texts.classes.index(row["label"]) for row in sample])
    chosen = [answers(setting, name, seed, sample).argmax(1) for name in names(kind, seed)]
    same = [float((a == b).mean()) for a, b in combinations(chosen, 2)]
    return statistics.mean(same), statistics.mean(float((each == truth).mean()) for each in chosen)


def mixtures(setting: Setting, kind: str, seed: int) -> dict[str, float]:
    """What the mean probabilities of the first 2, 4, 8 teachers gain on the transfer texts over one of them, points."""
    _, rows = pools(setting, seed)
    truth = np.array([setting.texts.classes.index(row["label"]) for row in rows])
    shares = np.stack([softmax(answers(setting, name, seed, rows), axis=1) for name in names(kind, seed)])
    right = (shares.argmax(2) == truth).mean(1)  # [T]
    sharp = softmax(shares.max(2) / TAU, axis=0)  # [T,N], weights by confidence
    gained: dict[str, float] = {}
    for count in COUNTS[1:]:
        weights = sharp[:count] / sharp[:count].sum(0)
        for name, mixed in (
            (f"{count}", shares[:count].mean(0)),
            (f"{count}, confidence", (weights[..., None] * shares[:count]).sum(0)),
        ):
            gained[name] = 100 * float((mixed.argmax(1) == truth).mean() - right[:count].mean())
    return gained


def gains(setting: Setting, arms: Found, seeds: int) -> list[dict[str, Any]]:
    """Per setting, size and number of teachers: agreement, accuracy of one teacher, gain over the student of one."""
    found: list[dict[str, Any]] = []
    for kind in SETTINGS:
        measured = [agreement(setting, kind, seed) for seed in range(seeds)]
        same, right = (100 * statistics.mean(each) for each in zip(*measured, strict=True))
        for layers, counts in SIZES.items():
            alone = arms.get(_arm(kind, layers, 1), {})
            for count in counts[1:]:
                gain = difference(arms.get(_arm(kind, layers, count), {}), alone)
                if gain is not None:
                    found.append(
                        {
                            "setting": kind,
                            "layers": layers,
                            "teachers": count,
                            "agreement": round(same, 1),
                            "one teacher": round(right, 1),
                            "student of one": round(mean(arms, _arm(kind, layers, 1)) or 0.0, 2),
                            "gain": round(gain.mean, 2),
                            "half": round(gain.half, 2),
                            "p": gain.p,
                        }
                    )
    return found


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """What each setting gives, by agreement; writes the figure."""
    lines = []
    for kind in SETTINGS:
        same, right = zip(*(agreement(setting, kind, seed) for seed in range(seeds)), strict=True)
        each = [mixtures(setting, kind, seed) for seed in range(seeds)]
        mixed = ", ".join(f"{name}: {statistics.mean(one[name] for one in each):+.1f}" for name in each[0])
        lines.append(
            f"{kind}: teachers agree on {100 * statistics.mean(same):.1f}%, one is right on "
            f"{100 * statistics.mean(right):.1f}% of {SAMPLE}; mixtures against one of them, points: {mixed}"
        )
    points = gains(setting, arms, seeds)
    if not points:
        return lines
    (setting.runs / "gains.json").write_text(json.dumps(points, indent=1))
    draw(points)
    return lines + [
        f"{p['setting']}: teachers agree on {p['agreement']:.0f}%, one is right on {p['one teacher']:.0f}%; "
        f"{p['layers']} layers, {p['teachers']} teachers instead of one: {p['gain']:+.2f} +- {p['half']:.2f}, "
        f"p = {p['p']:.4f}"
        for p in points
    ]


def draw(points: list[dict[str, Any]]) -> None:
    """The gain of more teachers against their agreement, a line per number of teachers."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "mtkd", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for layers, line in ((2, "-"), (3, ":")):
        for count, colour in ((2, "#9ecae1"), (4, "#4292c6"), (8, "#08306b")):
            some = sorted((p["agreement"], p) for p in points if (p["layers"], p["teachers"]) == (layers, count))
            if some:
                x, y, half = zip(*((p["agreement"], p["gain"], p["half"]) for _, p in some), strict=True)
                label = f"{count} teachers, student of {layers} layers"
                axes.errorbar(
                    x, y, half, linestyle=line, color=colour, marker="o", markersize=3, capsize=2, label=label
                )
    for p in points:
        if (p["layers"], p["teachers"]) == (2, 8):
            axes.annotate(p["setting"], (p["agreement"], p["gain"]), (4, 4), textcoords="offset points")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set_yscale("symlog", linthresh=2)
    axes.set_yticks((-1, 0, 1, 3, 10, 30), labels=("-1", "0", "+1", "+3", "+10", "+30"))
    axes.set_xlabel("two teachers choose the same class, % of 256 texts")
    axes.set_ylabel("gain over the student of one teacher, points")
    axes.legend(frameon=False)
    figure.savefig(PLOT, metadata={"Date": None})
    plt.close(figure)


PROOF = Proof(groups, (), ("banking77",), 5, notes=notes)
