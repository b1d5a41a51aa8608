"""Three teachers of very different worth, and a student that learns from them: the stress test of the weightings.

The words of an example give away its class, some of them wrongly. The teachers are tables of logits: `good` is right
nine times out of ten, `half` knows the first half of the classes and is unsure about the others, `noise` is random.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tiny import CPU, classifier, make_objective
from torch import Tensor

from mtkd.config import Named, OptimizerConfig
from mtkd.data.batch import Batch
from mtkd.engine.torch_engine import TorchEngine
from mtkd.methods.papers import kd
from mtkd.models.features import Features
from mtkd.objective.looks import after_step, before_step
from mtkd.objective.objective import Objective
from mtkd.running.train import global_counts

CLASSES, LENGTH, WORDS = 4, 8, 6  # words per class
TRAIN, TEST, BATCH = 384, 512, 32
TEACHERS = ("good", "half", "noise")


@dataclass
class Task:
    """Token ids [N,L], classes [N], and the teachers' logits [T,N,C]; the first TRAIN examples are for training."""

    ids: Tensor
    labels: Tensor
    logits: Tensor

    def batch(self, rows: Tensor) -> Batch:
        """Some examples."""
        return Batch(rows, self.ids[rows], torch.ones_like(self.ids[rows]).bool(), self.labels[rows])


def make_task(seed: int, sure_noise: bool) -> Task:
    """The task of a seed; `sure_noise`: the random teacher is as sure of itself as the good one."""
    generator = torch.Generator().manual_seed(seed)
    count = TRAIN + TEST
    labels = torch.randint(CLASSES, (count,), generator=generator)
    honest = torch.rand(count, LENGTH, generator=generator) < 0.5
    classes = labels[:, None].where(honest, torch.randint(CLASSES, (count, LENGTH), generator=generator))
    ids = 1 + classes * WORDS + torch.randint(WORDS, (count, LENGTH), generator=generator)

    def sure_of(classes: Tensor) -> Tensor:
        return 4 * torch.nn.functional.one_hot(classes, CLASSES).float()

    def random(scale: float) -> Tensor:
        return scale * torch.randn(count, CLASSES, generator=generator)

    other = torch.randint(CLASSES, (count,), generator=generator)
    right = torch.rand(count, generator=generator) < 0.9
    good = sure_of(labels.where(right, other)) + random(0.5)
    knows = (labels < CLASSES // 2)[:, None]
    half = (sure_of(labels) + random(0.5)).where(knows, random(0.7))
    noise = sure_of(other.roll(1)) + random(0.5) if sure_noise else random(0.7)
    return Task(ids, labels, torch.stack([good, half, noise]))


class Tables:
    """A pool whose teachers look their logits up."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def forward(self, batch: Batch) -> list[Features]:
        return [{"logits": table[batch.keys]} for table in self._logits]


@dataclass
class Stage:
    """As much of a built stage as a step needs."""

    objective: Objective
    pool: Tables
    engine: TorchEngine


@dataclass
class Outcome:
    """Mean weights per teacher over the last quarter of the steps, and the student on held-out examples."""

    weights: list[float]
    loss: float
    accuracy: float

    def __str__(self) -> str:
        shown = ", ".join(f"{name} {w:.3f}" for name, w in zip(TEACHERS, self.weights, strict=True))
        return f"{shown}; held-out loss {self.loss:.3f}, accuracy {self.accuracy:.3f}"


def distil(task: Task, weighting: str, seed: int, hard: float = 0.5, steps: int = 120, **options: object) -> Outcome:
    """Train a student from scratch on the teachers' predictions and, with the share `hard`, on labels."""
    torch.manual_seed(seed)
    student = classifier(16, 1, seed, num_labels=CLASSES)
    named = Named(name=weighting, options=options)
    objective, _ = make_objective(
        student, [classifier(8, 1, 1, CLASSES)] * 3, [*kd(temperature=1.0, soft=1 - hard, hard=hard).values()], named
    )
    stage = Stage(objective, Tables(task.logits), TorchEngine(objective, OptimizerConfig(lr=5e-3), steps, CPU))
    order = torch.Generator().manual_seed(seed)
    weights = torch.zeros(3)
    for step in range(steps):
        if step % (TRAIN // BATCH) == 0:
            epoch = torch.randperm(TRAIN, generator=order).split(BATCH)
        micro_batches = [task.batch(epoch[step % (TRAIN // BATCH)])]
        counts, _ = global_counts(micro_batches, stage.engine.dist, more=objective.weighting.counts)
        for batch, teachers in before_step(stage.objective, stage.pool, stage.engine, step, micro_batches, counts):
            loss, metrics = stage.engine.forward(batch, teachers, counts)
            stage.engine.backward(loss)
            if step >= steps * 3 // 4:
                weights += torch.stack([metrics[f"weight/t{k}"] for k in range(3)]) / (steps - steps * 3 // 4)
        stage.engine.step(step)
        after_step(stage.objective, stage.engine, micro_batches)
    held_out = task.batch(torch.arange(TRAIN, TRAIN + TEST))
    with torch.no_grad():
        logits = student.eval()(held_out, frozenset({"logits"}))["logits"].values
    loss = float(torch.nn.functional.cross_entropy(logits, held_out.targets))
    return Outcome(weights.tolist(), loss, float((logits.argmax(-1) == held_out.targets).float().mean()))
