"""Look at the teachers of a stage on some train texts before it begins: how far do they agree?

It costs a fixed share of the stage and changes no bit of it: nothing is drawn, and the data stream does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mtkd.config import BatchConfig
from mtkd.data.batch import STUDENT, Batch
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.data.split import Split
from mtkd.engine.dist import Dist, alive, on_main
from mtkd.engine.folder import StageDir
from mtkd.engine.notes import Agreement
from mtkd.engine.record import read_record, write_record
from mtkd.evaluate.consensus import summary, tally
from mtkd.evaluate.report.wording import agreement_text
from mtkd.models.features import SparseLogits, as_logits
from mtkd.models.forward import LOGITS
from mtkd.models.pieces import EVERY_PIECE
from mtkd.objective.kept import read
from mtkd.planning.spec import StageSpec
from mtkd.pool import Teacher
from mtkd.running.build import BuiltStage
from mtkd.running.sample import batches_of, spread

# At most so many texts, and a share of what the stage itself gives its teachers; fewer than some texts say nothing.
_TEXTS, _SHARE, _FEWEST = 256, 0.01, 16


def note_consensus(built: BuiltStage, spec: StageSpec, folder: StageDir) -> dict[str, Any]:
    """Say how far the teachers of a stage agree, and keep it in the stage's folder. A collective.

    Returns:
        The record of `mtkd.evaluate.consensus.summary`, measured now or in an earlier session; {} where it is not
        measured: one teacher, predictions that are not read or of other texts, regression, drawn columns or another
        temperature than 1 in a cache, a stage too short for its cost.
    """
    dist, file = built.engine.dist, folder.agreement_file
    found = on_main(dist, lambda: read_record(file, Agreement) if file.exists() else None)
    if found is None:
        found = _measured(built, spec)
        if found:
            on_main(dist, lambda: _keep(file, found))
    if found:
        say(f"  {agreement_text(found)}", main=dist.is_main)
    return found


def _keep(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_record(file, found)


def _measured(built: BuiltStage, spec: StageSpec) -> dict[str, Any]:
    split, device, dtype = built.data.splits["train"], built.engine.device, built.objective.dtype
    if not _readable(spec, built.pool.teachers, built.data):
        return {}
    texts = _texts(split, built.stage.batch, built.steps)
    if len(texts) < _FEWEST:
        return {}
    batches = (batch.to(device) for batch in batches_of(split, texts, built.stage.batch, built.engine.dist))
    return agreement_of(built.pool.teachers, batches, dtype, built.objective.tile, built.engine.dist)


def _readable(spec: StageSpec, teachers: Sequence[Teacher], data: LoadedData) -> bool:
    """Whether there are several teachers with predictions about the split's own texts."""
    views = all(teacher.view == STUDENT for teacher in teachers)
    several = len(teachers) > 1 and "logits" in spec.heads
    return several and views and not spec.stage.transforms and data.num_labels != 1


@torch.no_grad()
def agreement_of(
    teachers: Sequence[Teacher], batches: Iterable[Batch], dtype: torch.dtype, tile: int, dist: Dist
) -> dict[str, Any]:
    """How far teachers agree about some batches; a collective.

    Args:
        batches: this rank's, on the device.
        dtype: of the products with the heads.
        tile: positions whose logits exist at one time.
    Returns:
        The record of `mtkd.evaluate.consensus.summary`; {} of drawn columns, of another temperature than 1 in a cache,
        and where nothing is to be predicted.
    """
    cases, unknown, sums = 0, False, torch.zeros(1 + len(teachers) * (len(teachers) - 1) // 2, dtype=torch.float64)
    for batch in batches:
        index, sums = batch.where(_counted), sums.to(batch.keys.device)
        logits = [as_logits(t.forward(batch, LOGITS)["logits"]).in_dtype(dtype) for t in teachers]
        alive()
        sparse = [x.values for x in logits if isinstance(x, SparseLogits)]
        unknown = unknown or any(x.tail is None or x.temperature != 1 for x in sparse)
        if not unknown:
            for piece in EVERY_PIECE.of(len(index), tile):
                sums += tally([read(x, index[piece]) for x in logits])
            cases += len(index)
    *total, count, lost = dist.sum([*sums.tolist(), cases, unknown])
    return {} if lost or not count else summary([t.name for t in teachers], int(count), total)


def some_texts(split: Split) -> np.ndarray:
    """At most 256 examples from all over the split."""
    return spread(np.arange(len(split)), _TEXTS)


def _texts(split: Split, batch: BatchConfig, steps: int) -> np.ndarray:
    """Examples from all over the split, as many as the stage's length is worth."""
    texts = some_texts(split)
    if batch.tokens is not None:
        return texts[np.cumsum(split.lengths[texts]) <= _SHARE * steps * batch.tokens]
    assert batch.sequences is not None
    return texts[: int(_SHARE * steps * batch.sequences)]


def _counted(batch: Batch) -> torch.Tensor:
    return batch.target_mask if batch.targets.dim() == 2 else batch.real
