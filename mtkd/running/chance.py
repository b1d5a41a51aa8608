"""Test teachers before a student learns from them: are their classes mixed up, are they flat or too sure?"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from mtkd.config import BatchConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.engine.dist import Dist, alive
from mtkd.evaluate.calibration import knows, outputs
from mtkd.models.features import as_logits
from mtkd.models.forward import LOGITS
from mtkd.pool import CachedTeacher, CalibratedTeacher, Teacher
from mtkd.running.sample import batches_of, labelled, spread

# The most texts of the test: 256 tell 40% from 50% at three standard errors.
_TEXTS = 256
# Of language models: tokens of the second test. A difference of 0.1 is far beyond chance then.
_TOKENS, _TILE, _FAR = 2048, 128, 0.1


def warn_below_chance(
    teachers: Mapping[str, Teacher], data: LoadedData, batch: BatchConfig, device: torch.device, dist: Dist
) -> dict[str, float]:
    """Warn of teachers that are right less often than a guess on labelled train texts. A collective.

    A specialist is asked about texts of its own classes, and a guess is one of these.

    It draws no random numbers and does not move the data stream, so it changes no bit of the run.

    Args:
        teachers: those whose predictions are read, by their place in the configuration.
        data: of the stage.
        batch: size of a batch that fits into memory.
    Returns:
        Per teacher the share of texts of its classes that it classifies correctly; {} where no text has a class.
    """
    split = data.splits["train"]
    if data.num_labels < 2 or not data.config.labelled or split.labels is None:
        return {}
    texts = labelled(split)
    if not len(texts):
        return {}
    chosen = spread(texts, _TEXTS)
    shares: dict[str, float] = {}
    for place, teacher in teachers.items():
        if teacher.view != STUDENT:
            continue  # a transform writes its text, and these batches come from the split
        sums = np.zeros(3)  # right ones, texts, classes to guess from
        for some in batches_of(split, chosen, batch, dist):
            sums += _hits(teacher, some.to(device))
            alive()
        right, count, classes = dist.sum(sums.tolist())
        classes = round(classes / max(count, 1))
        shares[teacher.name] = right / max(count, 1)
        if count and shares[teacher.name] < 1 / classes:
            say(
                f"warning: {place}: teacher '{teacher.name}' is right on {right:.0f} of {count:.0f} labelled train "
                f"texts, less often than a guess (1 of {classes}). Are its classes in another order? "
                "`mtkd plan` shows which output is which class; `classes` of the teacher says it",
                main=dist.is_main,
            )
    return shares


def _hits(teacher: Teacher, batch: Batch) -> np.ndarray:
    """(right ones, texts of the teacher's classes, its classes summed over these) of a batch."""
    index = batch.target_mask.nonzero().squeeze(-1)
    rows, labels = as_logits(teacher.forward(batch, LOGITS)["logits"]).rows(index), batch.targets[index]
    known = knows(rows, labels)
    rows, labels = rows[known], labels[known]
    own = int(outputs(rows).sum())
    return np.array([float((rows.argmax(-1) == labels).sum()), len(labels), own])


def warn_uncalibrated(
    teachers: Mapping[str, Teacher], data: LoadedData, batch: BatchConfig, device: torch.device, dist: Dist
) -> dict[str, tuple[float, float]]:
    """Warn of teachers whose mean confidence is far from how often they are right, on validation labels. A collective.

    As `warn_below_chance` it changes no bit of the run. A cache has no answers about these texts, and a calibrated
    teacher needs no warning.

    Args:
        teachers, data, batch: see `warn_below_chance`.
    Returns:
        Per teacher (mean confidence, accuracy); {} without labelled validation texts.
    """
    split, found = data.splits.get("validation"), dict[str, tuple[float, float]]()
    if split is None or not split.has_targets or data.num_labels == 1:
        return found
    most = _TEXTS if split.labels is not None else min(_TEXTS, max(1, int(_TOKENS / split.lengths.mean())))
    chosen = spread(labelled(split), most)
    for place, teacher in teachers.items():
        if teacher.view != STUDENT or isinstance(teacher, CalibratedTeacher | CachedTeacher):
            continue
        sums = np.zeros(3)  # confidences, right ones, labels
        for some in batches_of(split, chosen, batch, dist):
            sums += _confidence(teacher, some.to(device))
            alive()
        sure, right, count = dist.sum(sums.tolist())
        sure, right = sure / max(count, 1), right / max(count, 1)
        found[teacher.name] = sure, right
        # three standard errors of the accuracy at most, so that few labels do not cry wolf
        if abs(sure - right) > max(_FAR, 1.5 / max(count, 1) ** 0.5):
            what, but = ("flat", "learns slowly") if sure < right else ("overconfident", "is misled where it is wrong")
            say(
                f"warning: {place}: teacher '{teacher.name}' is {what}: its mean confidence is {sure:.2f}, and it is "
                f"right on {right:.2f} of {count:.0f} validation labels. A student {but}, and weightings compare "
                "confidences: set `calibrate: true` for it",
                main=dist.is_main,
            )
    return found


def _confidence(teacher: Teacher, batch: Batch) -> np.ndarray:
    """(sum of the largest probabilities, right ones, labels) of a batch."""
    logits, sums = as_logits(teacher.forward(batch, LOGITS)["logits"]), np.zeros(3)
    targets = batch.targets.reshape(-1)
    for index in batch.target_mask.reshape(-1).nonzero().squeeze(-1).split(_TILE):
        rows, labels = logits.rows(index), targets[index]
        known = knows(rows, labels)
        best = torch.softmax(rows[known], -1).max(-1)
        right = int((best.indices == labels[known]).sum())
        sums += [float(best.values.sum()), right, len(best.values)]
    return sums
