"""Test teachers of classes before a student learns from them: below chance, their classes may be mixed up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch

from mtkd.config import BatchConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.data.sampler import length_batches, slots
from mtkd.engine.dist import Dist, alive
from mtkd.models.features import as_logits
from mtkd.models.forward import LOGITS
from mtkd.pool import Teacher

# The most texts and batches of the test: it must take seconds before a stage of hours. 256 texts tell 40% from 50% at
# three standard errors.
_TEXTS, _BATCHES = 256, 32


def warn_below_chance(
    teachers: Mapping[str, Teacher], data: LoadedData, batch: BatchConfig, device: torch.device, dist: Dist
) -> dict[str, float]:
    """Warn of teachers that are right less often than a guess on labelled train texts. A collective.

    It draws no random numbers and does not move the data stream, so it changes no bit of the run.

    Args:
        teachers: those whose predictions are read, by their place in the configuration.
        data: of the stage.
        batch: size of a batch that fits into memory.
    Returns:
        Per teacher the share of texts that it classifies correctly; {} where no text has a class.
    """
    split = data.splits["train"]
    if data.num_labels < 2 or not data.config.labelled or split.labels is None:
        return {}
    labelled = np.flatnonzero(split.labels >= 0)
    if not len(labelled):
        return {}
    chosen = labelled[np.unique(np.linspace(0, len(labelled) - 1, min(_TEXTS, len(labelled))).astype(int))]
    shares: dict[str, float] = {}
    for place, teacher in teachers.items():
        if teacher.view != STUDENT:
            continue  # a transform writes its text, and these batches come from the split
        right = count = 0.0
        for some in _batches(data, chosen, batch, dist):
            on_device = some.to(device)
            index = on_device.target_mask.nonzero().squeeze(-1)
            logits = as_logits(teacher.forward(on_device, LOGITS)["logits"]).rows(index)
            right += float((logits.argmax(-1) == on_device.targets[index]).sum())
            count += len(index)
            alive()
        right, count = dist.sum([right, count])
        shares[teacher.name] = right / max(count, 1)
        if shares[teacher.name] < 1 / data.num_labels:
            say(
                f"warning: {place}: teacher '{teacher.name}' is right on {right:.0f} of {count:.0f} labelled train "
                f"texts, less often than a guess (1 of {data.num_labels}). Are its classes in another order? "
                "`mtkd plan` shows which output is which class; `classes` of the teacher says it",
                main=dist.is_main,
            )
    return shares


def _batches(data: LoadedData, texts: np.ndarray, batch: BatchConfig, dist: Dist) -> Iterator[Batch]:
    """This rank's batches of the texts; every rank has the same number, for `forward` may be a collective."""
    split = data.splits["train"]
    steps = list(length_batches(texts, split.lengths, batch))
    for step in steps[:: -(-len(steps) // _BATCHES)]:
        for slot in slots(step.tolist(), dist.world_size, batch.accumulate, split.lengths)[dist.rank]:
            yield split.collate(slot, size=max(1, len(slot)))
