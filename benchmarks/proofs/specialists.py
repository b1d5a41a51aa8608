"""Three teachers, each of which knows a third of the classes; texts of all classes without labels; one student for all.

A teacher has one output per class of its own and one more, "other", that it learnt from examples of other classes.
Five texts per class have a label. Students see the same texts for equally many steps, with KL at T = 1; arms that say
"+ labels" have the labels of the five as well. Of each seed differ: which texts are whose, which classes are whose,
the teachers, and the students. Weightings that read labels find them on the five texts of each class alone.
"""

from __future__ import annotations

import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file
from scipy.special import logsumexp, softmax
from sides.compare import difference

from proofs.corpora import Row
from proofs.proof import Found, Proof, best_of, mean
from proofs.setting import HARD, SOFT, Group, Setting, Stage, group_of

TEACHERS = 3
SLICE = 5  # labelled texts per class
OWN_SHARE = 0.4  # of a class's other texts, that its teacher learns from; the rest is for transfer
OTHERS = 1.0  # "other" examples of a teacher, per example of its own classes
STEPS = {"teacher": 180, "student": 120}
STUDENT, TEACHER = 2, 4  # layers

FREE = {
    "confidence": "confidence",
    "entropy": "entropy",
    "margin": "margin",
    "mgda": "mgda",
    "abstain": "abstain",
}
SLICED = {
    "learned": {"name": "learned", "options": {"anchor_share": 1.0}},
    "learned, gated": {"name": "learned", "options": {"anchor_share": 1.0, "gate": "pooled"}},
    "ca_mkd": "ca_mkd",
    "mt_bert": "mt_bert",
    "rl_kd": "rl_kd",
}
SEARCHED: dict[str, Any] = {
    "sharp entropy": {"name": "sharp_entropy", "options": {"tau": 0.3}},
    "energy": {"name": "energy", "options": {"tau": 0.5}},
    "abstain, power 4": {"name": "abstain", "options": {"power": 4.0}},
}
SHARPENED = {"abstain, teachers at 0.5": "abstain", "oracle, teachers at 0.5": "route"}
"""With teachers whose logits are divided by 0.5: labels of their own classes in the slice say so."""


def cut(setting: Setting, seed: int) -> dict[str, list[Row]]:
    """The rows of a seed: own0, own1, own2, transfer, slice."""
    draw = random.Random(seed)
    names = list(setting.texts.classes)
    draw.shuffle(names)
    group = {name: number % TEACHERS for number, name in enumerate(names)}
    rows: dict[str, list[Row]] = {name: [] for name in ("transfer", "slice", *(f"own{k}" for k in range(TEACHERS)))}
    pool: list[list[Row]] = [[] for _ in range(TEACHERS)]
    for name in names:
        of_class = [row for row in setting.texts.train if row["label"] == name]
        draw.shuffle(of_class)
        labelled, others = of_class[:SLICE], of_class[SLICE:]
        kept = round(OWN_SHARE * len(others))
        pool[group[name]] += others[:kept]
        where = {"teacher": f"s{group[name]}"}
        rows["slice"] += labelled
        rows["transfer"] += [{**row, **where} for row in labelled]
        rows["transfer"] += [{"text": row["text"], "label": "", **where} for row in others[kept:]]
    for k, own in enumerate(pool):
        others = [row for j, theirs in enumerate(pool) if j != k for row in theirs]
        draw.shuffle(others)
        rows[f"own{k}"] = own + [{**row, "label": "other"} for row in others[: round(OTHERS * len(own))]]
    for each in rows.values():
        draw.shuffle(each)
    return rows


def blocks(setting: Setting, seed: int) -> dict[str, dict[str, Any]]:
    """The `data` entries of a seed."""
    rows = cut(setting, seed)
    made = {name: setting.block(setting.write(name, rows[name], seed)) for name in ("transfer", "slice")}
    for k in range(TEACHERS):
        own = sorted({row["label"] for row in rows[f"own{k}"]} - {"other"})
        test = [{**row, "label": row["label"] if row["label"] in own else "other"} for row in setting.texts.test]
        files = setting.write(f"own{k}", rows[f"own{k}"], seed), setting.write(f"own{k}-test", test, seed)
        made[f"own{k}"] = setting.block(*files, labels=[*own, "other"])
    return made


def groups(setting: Setting, seed: int) -> list[Group]:
    data = blocks(setting, seed)
    transfer = {"transfer": data["transfer"]}
    names = [f"s{k}" for k in range(TEACHERS)]
    taught = {name: setting.labels(f"own{k}", STEPS["teacher"], TEACHER) for k, name in enumerate(names)}
    cache = {
        "kind": "cache",
        "data": "transfer",
        "teachers": [
            {"name": name, "model": setting.export("teachers", seed, k, name), "other": "other"}
            for k, name in enumerate(names, 1)
        ],
        "batch": {"tokens": 2_048},
    }
    owned = {f"own{k}": data[f"own{k}"] for k in range(TEACHERS)}
    three = [setting.cached("cache", seed, 1, name) for name in names]

    def of(teachers: list[dict[str, Any]], **values: Any) -> Stage:
        return setting.distil("transfer", STEPS["student"], STUDENT, teachers, **values)

    def weighted(arms: dict[str, Any], **values: Any) -> dict[str, Stage]:
        return {name: of(three, weighting=weighting, **values) for name, weighting in arms.items()}

    plain = {f"teacher {k} alone": of([three[k]]) for k in range(TEACHERS)}
    plain |= {"uniform": of(three)}
    # Over logits there is no mean: a specialist has none for classes that are not its own, and mtkd says so.
    plain["uniform over probabilities"] = of(three, match=[{**SOFT, "ensemble": "probabilities"}])
    both = {"match": [SOFT, HARD]}
    labelled = {"teacher 0 alone + labels": of(three[:1], **both)}
    with_labels = {"uniform + labels": "uniform", "abstain + labels": "abstain", "oracle + labels": "route"}
    labelled |= weighted(with_labels, **both)
    sharp = [{**each, "calibrate": 0.5} for each in three]
    searched = {**weighted(SEARCHED), **{name: of(sharp, weighting=how) for name, how in SHARPENED.items()}}
    alone = {"labels of the slice": setting.labels("slice", STEPS["student"], STUDENT)}
    needs = ("cache",)
    return [
        Group("teachers", owned, taught),
        Group("cache", transfer, {"cache": cache}, needs=("teachers",)),
        group_of("plain", transfer, plain, needs),
        group_of("free", transfer, weighted({**FREE, "oracle": "route"}), needs),
        group_of("slice", {"slice": data["slice"]}, alone),
        group_of("searched", transfer, searched, needs),
        group_of("sliced", transfer, weighted(SLICED), needs),
        group_of("labelled", transfer, labelled, needs),
    ]


def derive(arms: Found) -> Found:
    """With the best single teacher's student of each seed."""
    best = best_of(arms, [f"teacher {k} alone" for k in range(TEACHERS)])
    return {"best teacher alone": best, **arms}


def routed(setting: Setting, seed: int) -> dict[str, tuple[float, float]]:
    """What the teachers' caches say of weightings, without a student.

    Returns:
        weighting -> percent of transfer texts that the mixture of probabilities is right on, and percent of them whose
        own teacher has the largest weight; {} without caches.
    """
    caches = [Path(setting.cached("cache", seed, 1, f"s{k}")["model"]) for k in range(TEACHERS)]
    if not all(cache.exists() for cache in caches):
        return {}
    logits = np.stack([np.concatenate([load_file(shard)["classes"] for shard in sorted(cache.glob("shard-*"))])
                       for cache in caches])  # [T,N,C+1], "other" last  # fmt: skip
    known = {row["text"]: row["label"] for row in setting.texts.train}
    rows = cut(setting, seed)["transfer"]
    truth = np.array([setting.texts.classes.index(known[row["text"]]) for row in rows])
    own = np.array([int(row["teacher"][1:]) for row in rows])
    shares, claims = softmax(logits[..., :-1], axis=2), 1 - softmax(logits, axis=2)[..., -1]
    weights = {
        "uniform": np.full_like(claims, 1 / TEACHERS),
        "confidence": softmax(shares.max(2) / 0.1, axis=0),
        "energy": softmax(logsumexp(logits[..., :-1], axis=2) / 0.5, axis=0),
        "abstain": claims / claims.sum(0),
        "oracle": (np.arange(TEACHERS)[:, None] == own).astype(np.float32),
    }
    return {
        name: (
            100 * float(((each[..., None] * shares).sum(0).argmax(1) == truth).mean()),
            100 * float((each.argmax(0) == own).mean()),
        )
        for name, each in weights.items()
    }


def notes(setting: Setting, arms: Found, seeds: int) -> list[str]:
    """The goals of issue 15, point 1."""
    weightings = [name for name in (*FREE, *SLICED, *SEARCHED, "abstain, teachers at 0.5") if name in arms]
    if not weightings or "best teacher alone" not in arms or "oracle" not in arms:
        return []
    best = max(weightings, key=lambda name: mean(arms, name) or 0.0)
    lines = [f"best weighting without the oracle: {best}"]
    mixed = [each for seed in range(seeds) if (each := routed(setting, seed))]
    for name in mixed[0] if mixed else ():
        right, sent = (statistics.mean(values) for values in zip(*(each[name] for each in mixed), strict=True))
        lines.append(
            f"mixture of the teachers under {name}: right on {right:.1f}%, its own teacher first on {sent:.1f}%"
        )
    gain = difference(arms[best], arms["best teacher alone"])
    over = difference(arms[best], arms["uniform"])
    most = difference(arms["oracle"], arms["best teacher alone"])
    if gain is None or over is None or most is None:
        return lines
    kept = gain.mean / most.mean

    def goal(text: str, met: bool) -> str:
        return f"{text}: **{'met' if met else 'missed'}**"

    return [
        *lines,
        goal(f"against the best single teacher's student {gain.text}, goal 10", gain.mean >= 10),
        goal(f"against uniform {over.text}, p = {over.p:.4f} (one test), goal 2", over.mean >= 2 and over.p < 0.01),
        goal(f"of the oracle's gain over the best single teacher kept {kept:.1%}, goal 95%", kept >= 0.95),
    ]


PROOF = Proof(groups, ("best teacher alone", "uniform"), ("banking77", "trec", "docstrings"), 5, derive, notes)
