"""Two looks around an optimizer step that a weighting may ask for.

Before it: the Gram matrix of the teachers' gradients over all micro-batches. After it: the student's loss, as a reward.
Both run the student without gradients, in eval mode and outside the engine's forward, as validation does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from mtkd.data.batch import Batch
from mtkd.data.device import moved
from mtkd.engine.base import Engine, Trainable
from mtkd.models.features import Features
from mtkd.models.forward import logits_of
from mtkd.objective.gram import gram
from mtkd.objective.objective import Objective
from mtkd.pool import TeacherPool
from mtkd.weightings.traits import Around, Traits


def before_step(
    objective: Trainable,
    pool: TeacherPool,
    engine: Engine,
    step: int,
    micro_batches: list[Batch],
    counts: dict[str, int],
) -> Iterable[tuple[Batch, list[Features]]]:
    """The step's micro-batches with their teachers' features; the objective learns the step's number and Gram matrix.

    Teachers run one micro-batch at a time. If the weighting reads the Gram matrix of the whole step, memory holds their
    features of all micro-batches, so that no teacher runs twice.
    """
    if not isinstance(objective, Objective):
        return ((batch, pool.forward(batch)) for batch in micro_batches)
    if "gram" not in objective.weighting.may_read() or len(objective.teacher_names) < 2:
        objective.begin_step(step)
        return ((batch, pool.forward(batch)) for batch in micro_batches)
    features_of_step = [pool.forward(batch) for batch in micro_batches]
    count = len(objective.teacher_names)
    objective.student.eval()
    with torch.no_grad():
        parts = []
        for batch, features in zip(micro_batches, features_of_step, strict=True):
            parts.append(gram(objective, batch, features, counts, engine.whole_head))
    objective.train()
    # Every rank solves for its weights from the same sum, so no rank can have others.
    total = engine.dist.sum(torch.stack(parts).sum(0).reshape(-1).tolist())
    objective.begin_step(step, torch.tensor(total, dtype=torch.float64).reshape(count, count))
    return list(zip(micro_batches, features_of_step, strict=True))


def after_step(objective: Trainable, engine: Engine, micro_batches: list[Batch]) -> None:
    """The reward of a weighting that wants one: the student's loss on each of the same examples, after the step."""
    if not isinstance(objective, Objective):
        return
    weighting = objective.weighting
    if not weighting.rewarded or not objective.teacher_names:
        return
    objective.student.eval()
    own = weighting.judged([_losses(objective, batch, engine) for batch in micro_batches])
    objective.train()
    # Summed over ranks: a reward by each rank's own examples would let the copies of the policy drift apart.
    total = engine.dist.sum(own.tolist())
    weighting.reward(moved(torch.tensor(total, dtype=torch.float64), own.device))


@torch.no_grad()
def _losses(objective: Objective, batch: Batch, engine: Engine) -> Tensor:
    """The student's mean loss on each example's labels, [B]."""
    logits = logits_of(objective.student, batch, objective.dtype)
    with engine.whole_head():
        logits = logits.in_dtype(objective.dtype)
        around = Around(objective.mapped(batch).labelled(), student={"logits": logits})
        return Traits([logits], around, "example", objective.tile).student_loss
