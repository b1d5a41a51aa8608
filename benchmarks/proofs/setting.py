"""What the runs of a proof share: data blocks, stages, run files, and the folders where finished runs are found."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sides.jobs import Job

from proofs.corpora import CORPORA, Corpus, Row, Texts, load

LAYERS = {7: None, 6: [1, 2, 3, 4, 6, 7], 5: [1, 3, 4, 6, 7], 4: [2, 4, 6, 7], 3: [3, 6, 7], 2: [6, 7]}
"""Layers of a model -> layers of the encoder that it is cut from; its seventh averages (`proofs.corpora.averaging`)."""

LR = {7: 0.4, 6: 0.4, 5: 0.5, 4: 0.7, 3: 1.0, 2: 1.0}
"""Layers -> learning rate, as a share of the corpus's: deep models with the small models' rate learn nothing."""

SOFT = {"feature": "logits", "loss": "kl"}
"""KL at T = 1."""

HARD = {"feature": "logits", "loss": "ce", "target": "labels"}

Stage = dict[str, Any]
PLUGINS = [str(Path(__file__).with_name(name).resolve()) for name in ("weights.py", "answering.py")]


@dataclass(frozen=True)
class Group:
    """Arms of one seed that share a run: setting one up takes as long as training a small student.

    Attributes:
        name: of the run, without its seed.
        data: entries of the run file; the first one is what is scored.
        stages: of the run file.
        arms: arm -> the stage that is scored for it.
        needs: names of groups of the same seed whose caches or models are read.
        shared: the same of seed 0, which all seeds read.
        ensemble: a stage whose teachers are scored as an ensemble.
    """

    name: str
    data: Mapping[str, Mapping[str, Any]]
    stages: Mapping[str, Stage]
    arms: Mapping[str, str] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    ensemble: str = ""


def group_of(
    name: str,
    data: Mapping[str, Any],
    arms: Mapping[str, Stage],
    needs: tuple[str, ...] = (),
    shared: tuple[str, ...] = (),
) -> Group:
    """A group of arms of one stage each."""
    stages = {f"arm{number}": stage for number, stage in enumerate(arms.values())}
    return Group(name, data, stages, dict(zip(arms, stages, strict=True)), needs, shared)


@dataclass
class Setting:
    """A proof's corpus, the size of its steps, and its folder."""

    proof: str
    task: str
    output: Path

    @cached_property
    def corpus(self) -> Corpus:
        return CORPORA[self.task]

    @cached_property
    def texts(self) -> Texts:
        return load(self.task, self.output / "data" / self.task)

    @property
    def runs(self) -> Path:
        return (self.output / "runs" / self.proof / self.task).resolve()

    def folder(self, group: str, seed: int) -> Path:
        return self.runs / f"{group}-{seed}"

    def write(self, name: str, rows: Iterable[Row], seed: int | None = None) -> str:
        """Write rows once; the path of the file."""
        place = self.output / "data" / self.task
        file = (place if seed is None else place / f"{self.proof}-{seed}") / f"{name}.jsonl"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            part.replace(file)
        return str(file.resolve())

    def block(self, train: str, test: str = "", labels: Sequence[str] = ()) -> dict[str, Any]:
        """A `data` entry; the test set is the corpus's own by default."""
        test = test or self.write("test", self.texts.test)
        return {
            "source": "files",
            "files": {"train": train, "test": test},
            "task": "classify",
            "labels": list(labels or self.texts.classes),
            "max_length": self.corpus.longest,
        }

    def student(self, layers: int) -> dict[str, Any]:
        cut = {} if LAYERS[layers] is None else {"keep_layers": LAYERS[layers]}
        return {"path": self.texts.model, "dropout": 0.1, **cut}

    def stage(self, data: str, steps: int, layers: int, **values: Any) -> Stage:
        batch = {"sequences": 32, "group_by_length": True}
        rate = {"lr": self.corpus.lr * LR[layers]}
        stage = {"data": data, "steps": steps, "batch": batch, "optimizer": rate, "student": self.student(layers)}
        return {**stage, **values}

    def labels(self, data: str, steps: int, layers: int, **values: Any) -> Stage:
        return self.stage(data, steps, layers, kind="finetune", **values)

    def distil(self, data: str, steps: int, layers: int, teachers: Sequence[Mapping[str, Any]], **values: Any) -> Stage:
        """A student of teachers; the KL at T = 1 by default."""
        match = {} if "method" in values or "match" in values else {"match": [SOFT]}
        return self.stage(data, steps, layers, kind="distill", teachers=list(teachers), **match, **values)

    def export(self, group: str, seed: int, number: int, stage: str) -> str:
        """The exported model of a stage of another group; `number` as in `cached`."""
        return str(self.folder(group, seed) / "stages" / f"{number:02}-{stage}" / "export")

    def cached(self, group: str, seed: int, number: int, name: str, stage: str = "cache") -> dict[str, Any]:
        """A teacher whose logits another group has kept.

        Args:
            number: of the cache stage in its run, from 1.
        """
        return {"name": name, "backend": "cached", "model": f"{self.export(group, seed, number, stage)}/{name}"}

    def job(self, group: Group, seed: int) -> Job:
        """The run file of a group and seed, as plain values."""
        scored = next(iter(group.data))
        evaluate: dict[str, Any] = {"data": scored, "resamples": 10, "batch": {"tokens": 2_048}}
        evaluate |= {"stages": list(dict.fromkeys(group.arms.values()))} if group.arms else {}
        evaluate |= {"ensembles": [group.ensemble]} if group.ensemble else {}
        config = {
            "name": self.folder(group.name, seed).name,
            "seed": seed,
            "output": str(self.runs),
            "plugins": PLUGINS,
            "data": {name: dict(block) for name, block in group.data.items()},
            "engine": {"kind": "torch", "device": "cpu", "precision": "bf16", "threads": 1},
            "stages": {name: dict(stage) for name, stage in group.stages.items()},
            "evaluate": evaluate,
            "log_every": 20,
        }
        needs = [*((name, seed) for name in group.needs), *((name, 0) for name in group.shared)]
        return Job(
            config, tuple(self.folder(*each) for each in needs), used_again=group.name.startswith(("teachers", "cache"))
        )
