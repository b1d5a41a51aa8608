"""Several specialist language models into one small student: which weights per token, over seeds and sizes.

    python benchmarks/language.py stdlib                  # two specialists of the Python library: prose and code
    python benchmarks/language.py stdlib --width 192      # a larger student
    python benchmarks/language.py math                    # four specialists of questions with exact answers
    python benchmarks/language.py CORPUS --table          # only the table, from what is there

Soft targets alone, equal steps on the same texts of all domains. The teachers are those of language_teachers.py, made
first where they are missing. Arms of a seed share runs with one thread. Finished runs are not redone: stop it and call
again.

The table gives per arm the mean and standard deviation over seeds of bits per byte (lower is better), the difference
to the best single specialist's student with the 95% interval over paired seeds (t), and the p-value of a paired
permutation test over test documents whose losses are averaged over seeds, corrected by Holm; of questions also the
share that is answered exactly, and how much of each domain's own specialist the student keeps. Seconds are those of the
student's training, with the teachers' forward passes where they are not read from a cache.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from language_teachers import Corpus, ask, asked, corpus, described, llama, teachers
from sides.compare import BITS, Runs, table
from sides.jobs import Job, done, set_environment, stage_folder, training_seconds, work

SOFT = {"name": "kd", "options": {"soft": 1.0, "hard": 0.0}}
STEPS = {"stdlib": 220, "math": 1_000}
LAYERS = 2  # of a student
SHARED = 5  # seeds of students that share a set of teachers
LABELS, POSTERIOR, TIMED = "labels alone", "posterior", "labels, equal time"
GENERALIST, ORACLE = "one generalist, all the steps", "oracle: the domain's specialist"
EXACT_BAYES = {"name": "posterior", "options": {"beta": 1.0, "forget": 1.0}}

Arms = dict[str, dict[str, Any]]
"""Arm -> what its stage has other than labels: its teachers by name, their weights; or other steps."""


def alone(domain: str) -> str:
    return f"{domain} alone"


def groups(corpus: Corpus) -> dict[str, Arms]:
    """Group -> its arms. A run has the arms of a group: reading the data takes as long as training a small student."""
    every, token = {"teachers": corpus.domains}, {"teachers": corpus.domains, "per": "token"}
    singles: Arms = {alone(domain): {"teachers": (domain,)} for domain in corpus.domains}
    posteriors: Arms = {
        POSTERIOR: {**token, "weighting": "posterior"},
        "posterior, beta 1, forget 1": {**token, "weighting": EXACT_BAYES},
    }
    if corpus.name == "math":
        posteriors["posterior per example"] = {**every, "weighting": "posterior"}
    return {
        "single": {LABELS: {}, **singles},
        "posterior": posteriors,
        "weighted": {
            **{name: {**token, "weighting": name} for name in ("uniform", "ca_mkd")},
            ORACLE: {**every, "weighting": "route"},
        },
        "others": {name: {**token, "weighting": name} for name in ("entropy", "confidence", "learned")},
        "calibrated": {
            "uniform, calibrated teachers": {**token, "weighting": "uniform", "calibrate": True},
            "posterior, calibrated teachers": {**token, "weighting": "posterior", "calibrate": True},
        },
        "generalist": {GENERALIST: {"teachers": ("generalist",)}},
    }


@dataclass(frozen=True)
class Setting:
    """A table: a corpus and a student."""

    corpus: Corpus
    width: int

    @property
    def steps(self) -> int:
        return STEPS[self.corpus.name]

    @property
    def student(self) -> dict[str, Any]:
        return llama(LAYERS, self.width)

    @property
    def mixed(self) -> dict[str, Any]:
        return {"mixed": self.corpus.entry(self.corpus.domains)}

    @property
    def cached(self) -> bool:
        """Whether students read caches: of answers of a few tokens, whose mass lies on a few ids."""
        return self.corpus.name == "math"

    def teachers(self, names: tuple[str, ...], number: int) -> list[dict[str, Any]]:
        """The teachers of set `number`: models or their caches."""
        runs = self.corpus.runs
        if not self.cached:
            return [{"name": n, "model": self.corpus.export(f"teacher-{n}-{number}")} for n in names]
        caches = {n: runs / f"cache-{n}-{number}" / "stages" / "01-cache" / "export" / n for n in names}
        return [{"name": n, "model": str(cache), "backend": "cached"} for n, cache in caches.items()]

    def cache(self, name: str, number: int) -> Job:
        kept = {"k": 16, "bits": 8, "traits": ["ce", "entropy", "confidence", "token_log_probs"]}
        teacher = {"name": name, "model": self.corpus.export(f"teacher-{name}-{number}")}
        stage = {"kind": "cache", "teachers": [teacher], "cache": kept, "batch": {"tokens": 8_192}}
        run = f"cache-{name}-{number}"
        return self.corpus.run(run, 0, {"cache": stage}, self.mixed, [f"teacher-{name}-{number}"])

    def stage(self, values: dict[str, Any], seed: int) -> dict[str, Any]:
        stage = self.corpus.labels(values.get("steps", self.steps), self.student)
        if "teachers" not in values:
            return stage
        values = dict(values)
        fitted = {"calibrate": True} if values.pop("calibrate", False) else {}
        named = [{**teacher, **fitted} for teacher in self.teachers(values["teachers"], seed // SHARED)]
        return {**stage, **values, "kind": "distill", "method": SOFT, "teachers": named}

    def name(self, group: str, seed: int) -> str:
        return f"students-{LAYERS}x{self.width}-{group}-{seed}"

    def job(self, group: str, arms: Arms, seed: int) -> Job:
        """The run of a group's arms."""
        names = {name for values in arms.values() for name in values.get("teachers", ())}
        first = "cache" if self.cached else "teacher"
        needs = [f"{first}-{name}-{seed // SHARED}" for name in sorted(names)]
        stages = {f"arm{i}": self.stage(values, seed) for i, values in enumerate(arms.values())}
        return self.corpus.run(self.name(group, seed), seed, stages, self.mixed, needs)


def equal_time(setting: Setting, seeds: int) -> dict[str, Arms]:
    """Labels for as long as the posterior's student trains, by the median seconds of both arms; {} before both are."""
    _, seconds, _ = find(setting, groups(setting.corpus), seeds)
    if not {LABELS, POSTERIOR} <= seconds.keys():
        return {}
    ratio = statistics.median(seconds[POSTERIOR]) / statistics.median(seconds[LABELS])
    return {"timed": {TIMED: {"steps": round(setting.steps * ratio)}}}


Hits = dict[str, dict[str, Runs]]


def find(setting: Setting, there: dict[str, Arms], seeds: int) -> tuple[dict[str, Runs], dict[str, list[float]], Hits]:
    """What the finished runs found: per arm the bits per byte, seconds, and per domain the hits; all by seed.

    Bits per byte are those of a document, times its share of all bytes and the number of documents: their mean is the
    corpus's.
    """
    bits: dict[str, dict[int, list[float]]] = {}
    seconds: dict[str, list[float]] = {}
    hits: dict[str, dict[str, dict[int, list[float]]]] = {}
    for seed in range(seeds):
        for group, arms in there.items():
            folder = setting.corpus.runs / setting.name(group, seed)
            for number, arm in enumerate(arms) if done(folder) else ():
                stage = f"arm{number}"
                file = stage_folder(folder, stage) / "scores.jsonl"
                rows = [json.loads(line) for line in file.read_text().splitlines()]
                scale = len(rows) / sum(row["bytes"] for row in rows) / math.log(2)
                bits.setdefault(arm, {})[seed] = [row["nll"] * scale for row in rows]
                seconds.setdefault(arm, []).append(training_seconds(folder, stage) or 0.0)
                for domain, _, hit in asked(folder, stage):
                    hits.setdefault(domain, {}).setdefault(arm, {}).setdefault(seed, []).append(float(hit))
    return bits, seconds, hits


def report(setting: Setting, seeds: int) -> str:
    """The tables of what is finished."""
    made = setting.corpus
    sets = range((seeds - 1) // SHARED + 1)
    lines = [described(job.folder) for number in sets for job in teachers(made, number)]
    bits, seconds, hits = find(setting, {**groups(made), "timed": {TIMED: {}}}, seeds)
    single = [name for name in map(alone, made.domains) if bits.get(name)]
    if not single:
        return "\n".join([*lines, "no student of a single specialist is finished"])
    cost = {"s": {arm: f"{statistics.median(took):.0f}" for arm, took in seconds.items()}}
    best = min(single, key=lambda name: statistics.mean(map(statistics.mean, bits[name].values())))
    lines += ["", f"{made.name}, student {LAYERS}x{setting.width}, {setting.steps} steps of {made.tokens} tokens", ""]
    lines += [table(bits, [best], cost, BITS)]
    if hits:
        every = {
            arm: {seed: _joined(hits, arm, seed) for seed in bits[arm]} for arm in bits if arm in hits[made.domains[0]]
        }
        best = max(single, key=lambda name: statistics.mean(map(statistics.mean, every[name].values())))
        lines += ["", table(every, [best], _kept(made, hits))]
    return "\n".join(lines)


def _joined(hits: Hits, arm: str, seed: int) -> list[float]:
    return [hit for runs in hits.values() for hit in runs[arm][seed]]


def _kept(made: Corpus, hits: Hits) -> dict[str, dict[str, str]]:
    """Per domain the percent answered, and the mean share of each domain's own specialist that is kept."""
    shares = {d: {arm: statistics.mean(map(statistics.mean, r.values())) for arm, r in hits[d].items()} for d in hits}
    own = {d: statistics.mean(hit for *_, hit in asked(made.runs / f"teacher-{d}-0", "teacher")) for d in hits}
    columns = {domain: {arm: f"{100 * share:.1f}" for arm, share in by.items()} for domain, by in shares.items()}
    arms = next(iter(shares.values()))
    return {**columns, "kept": {a: f"{statistics.mean(shares[d][a] / own[d] for d in own):.0%}" for a in arms}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=STEPS)
    parser.add_argument("--width", type=int, default=128, help="of the student")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=85, help="start nothing after this many minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/language"))
    parser.add_argument("--groups", nargs="+", default=[], help="only runs of these groups of arms")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and run nothing")
    arguments = parser.parse_args()
    set_environment()
    setting = Setting(corpus(arguments.corpus, arguments.output), arguments.width)
    if not arguments.table:
        run_all(setting, arguments)
    print(report(setting, arguments.seeds))


def run_all(setting: Setting, arguments: argparse.Namespace) -> None:
    """Everything that is not finished: teachers, caches, students, then labels for as long as the posterior took."""
    deadline, seeds = time.monotonic() + 60 * arguments.minutes, range(arguments.seeds)
    sets = range((len(seeds) - 1) // SHARED + 1)
    names = (*setting.corpus.domains, "generalist")
    first = [job for number in sets for job in teachers(setting.corpus, number)]
    caches = [setting.cache(name, number) for number in sets for name in names] if setting.cached else []

    def students(there: dict[str, Arms]) -> list[Job]:
        chosen = {g: arms for g, arms in there.items() if not arguments.groups or g in arguments.groups}
        return [setting.job(group, arms, seed) for seed in seeds for group, arms in chosen.items()]

    jobs = students(groups(setting.corpus))
    for earlier in (caches, first):
        needed = {need for job in [*jobs, *caches] for need in job.needs}
        earlier[:] = [job for job in earlier if job.folder in needed]
    # The generalist takes as long as all specialists together, and one arm reads it.
    ordered = sorted([*first, *caches, *jobs], key=lambda job: "generalist" in job.folder.name)
    work(ordered, arguments.workers, deadline)
    timed = students(equal_time(setting, arguments.seeds))
    work(timed, arguments.workers, deadline)
    for job in first:
        ask(job, keep=True)
    for job in [*jobs, *timed]:
        ask(job)


if __name__ == "__main__":
    main()
