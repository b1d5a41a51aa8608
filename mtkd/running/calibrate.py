"""Calibrate a stage's teachers before anything reads their logits; what was fitted stays in the stage's folder.

A stage that goes on reads the number again: fitted once more, on another machine or number of processes, it could
differ in its last digits, and half of the training would have another teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtkd.config import BatchConfig, CalibrateConfig, TeacherConfig
from mtkd.config.read import fingerprint
from mtkd.data.batch import Batch
from mtkd.data.load import LoadedData
from mtkd.data.progress import say
from mtkd.data.split import Split
from mtkd.engine.dist import alive, on_main
from mtkd.engine.notes import Calibrations
from mtkd.engine.record import read_record, write_record
from mtkd.engine.tile import tile_for
from mtkd.errors import DataError
from mtkd.evaluate.calibration import (
    COLDEST,
    HOTTEST,
    Observed,
    fit_temperature,
    fit_with_bias,
    knows,
    observe,
    quality,
)
from mtkd.models.calibrated import Calibration
from mtkd.models.features import DenseLogits, Logits, SparseLogits, as_logits
from mtkd.models.forward import LOGITS
from mtkd.planning.stages import redo_command
from mtkd.pool import CalibratedTeacher, Teacher
from mtkd.running.context import RunContext
from mtkd.running.identity import teacher_digest
from mtkd.running.sample import batches_of, labelled, spread

# Of language models: the most tokens that are read, and targets whose logits are looked at. 8,192 targets tell a
# temperature to about 1%. Wide vocabularies have fewer, 200 million logits in all: some minutes of a CPU.
_TOKENS, _TARGETS, _FEWEST, _LOGITS = 32_768, 8_192, 1_024, 200_000_000


def calibrate(context: RunContext, stage: str, teacher: Teacher, config: TeacherConfig, where: str) -> Teacher:
    """The teacher as the stage reads it: calibrated if its configuration asks for it. A collective.

    Args:
        teacher: as its backend opened it.
        where: its place in the configuration.
    Raises:
        DataError: there are no labels to fit on, a logit is not finite, or the record is damaged.
    """
    asked = config.calibrate
    if asked is None:
        return teacher
    if not asked.fits:
        assert isinstance(asked.temperature, float)
        return CalibratedTeacher(teacher, Calibration(asked.temperature))
    own = context.config.stages[stage]
    data = context.data(context.config.data_name(asked.data or own.data))
    key = fingerprint([teacher_digest(context, config), data.fingerprint, context.config.engine.decided_precision])
    path = context.folder(stage).calibration_file
    found = on_main(context.dist, lambda: fits_of(context, stage).get(config.name))
    if found is None or found["key"] != key:
        look = _Look(context, data, asked, own.batch, where)
        found = {"key": key, **look.fit(teacher)}
        on_main(context.dist, lambda: _record(path, stage, config.name, found))
        say(f"  {sentence(config.name, found)}", main=context.dist.is_main)
    return CalibratedTeacher(teacher, Calibration.from_json(found))


def fits_of(context: RunContext, stage: str) -> dict[str, Any]:
    """What was fitted for the teachers of a stage, by name; for the main rank.

    Raises:
        DataError: the record is damaged.
    """
    return _recorded(context.folder(stage).calibration_file, stage)


def _recorded(path: Path, stage: str) -> dict[str, Any]:
    """What was fitted for the teachers of a stage, by name."""
    try:
        values = read_record(path, Calibrations, f"begin the stage again: {redo_command([stage])}", old=False)
    except FileNotFoundError:
        return {}
    return dict(values["teachers"])


def _record(path: Path, stage: str, teacher: str, found: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_record(path, {"teachers": {**_recorded(path, stage), teacher: found}})


def sentence(teacher: str, found: dict[str, Any]) -> str:
    """What was fitted, for the terminal."""
    before, after = found["before"], found["after"]
    temperature = found["temperature"]
    more = " and a bias per class" if found["bias"] else ""
    if not 1.001 * COLDEST < temperature < 0.999 * HOTTEST:
        more += ", the end of the range: does it know these labels, or nothing of them?"
    return (
        f"teacher '{teacher}' is calibrated: temperature {temperature:.3g}{more}"
        f" (cross entropy {before['cross_entropy']:.3f} -> {after['cross_entropy']:.3f}, confidence "
        f"{before['confidence']:.2f} -> {after['confidence']:.2f} at accuracy {after['accuracy']:.2f}; "
        f"{found['labels']:,} labels of {found['data']}, {found['split']})"
    )


@dataclass(frozen=True)
class _Look:
    """One pass of a teacher over labelled texts.

    Attributes:
        data: with the labels.
        batch: size of a batch that fits into memory.
        where: place of the teacher.
    """

    context: RunContext
    data: LoadedData
    asked: CalibrateConfig
    batch: BatchConfig
    where: str

    def fit(self, teacher: Teacher) -> dict[str, Any]:
        """What the labels say of the teacher; the same on every rank, for the main one fits on the rows of all."""
        seen, rows, labels = self._gathered(teacher)
        found: dict[str, Any] = {}
        if self.context.dist.is_main:
            calibration = fit_with_bias(rows, labels) if self.asked.bias else Calibration(fit_temperature(seen))
            after, temperature = seen, calibration.temperature
            if self.asked.bias:
                shifted = torch.from_numpy(rows / temperature + np.array(calibration.bias))
                after, temperature = observe(shifted, torch.from_numpy(labels)), 1.0
            found = {
                **_of_classes(calibration, teacher.num_columns).as_json(),
                "labels": len(seen),
                "data": self.data.name,
                "split": self.asked.split,
                "before": quality(seen, 1.0),
                "after": quality(after, temperature),
            }
        return self.context.dist.broadcast_object(found)

    def _gathered(self, teacher: Teacher) -> tuple[Observed, np.ndarray, np.ndarray]:
        """(what was observed, logits and labels where a bias is fitted) of all ranks, on the main one."""
        dist = self.context.dist
        parts, kept = list[Observed](), list[tuple[np.ndarray, np.ndarray]]()
        batches = list(self._batches())
        total = dist.sum([sum(int(batch.target_mask.sum()) for batch in batches)])[0]
        if not total:
            raise self._nothing("there are no labels to calibrate on")
        for batch in batches:
            for rows, labels in self._rows(teacher, batch.to(self.context.device), self._stride(teacher, total)):
                try:
                    parts.append(observe(rows, labels))
                except ValueError:
                    raise DataError(f"teacher '{teacher.name}' gives logits that are not finite", where=self.where,
                                    todo="try engine.precision: fp32") from None  # fmt: skip
                if self.asked.bias:
                    kept.append((rows.double().cpu().numpy(), labels.cpu().numpy()))
            alive()
        if not dist.sum([sum(map(len, parts))])[0]:
            raise self._nothing(f"teacher '{teacher.name}' has no output for any of the labels to calibrate on")
        everything = dist.gather_objects((Observed.joined(parts), kept)) or []
        pairs = [pair for _, some in everything for pair in some] or [(np.zeros((0, 1)), np.zeros(0, np.int64))]
        rows_of_all, labels_of_all = (np.concatenate([pair[i] for pair in pairs]) for i in (0, 1))
        return Observed.joined([seen for seen, _ in everything]), rows_of_all, labels_of_all

    def _nothing(self, message: str) -> DataError:
        return DataError(
            message,
            where=f"{self.where}.calibrate",
            found=f"data.{self.data.name}, split {self.asked.split}",
            todo="name a split with such labels (split, data), or give a number: calibrate: {temperature: 0.5}",
        )

    def _stride(self, teacher: Teacher, total: float) -> int:
        """A language model's targets are looked at one in so many."""
        if not self.data.task.token_level:
            return 1
        most = min(_TARGETS, max(_FEWEST, _LOGITS // teacher.num_columns))
        return -(-int(total) // most)

    def _rows(self, teacher: Teacher, batch: Batch, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Tiles (logits [m,V], labels [m]) at a batch's targets."""
        logits = as_logits(teacher.forward(batch, LOGITS)["logits"]).in_dtype(self.context.dtype)
        index = batch.target_mask.reshape(-1).nonzero().squeeze(-1)[::stride]
        targets = batch.targets.reshape(-1)
        # a tile has several copies in float64 here
        tile = max(tile_for(self.context.config.engine, teacher.num_columns, self.context.device.type) // 4, 16)
        for positions in index.split(tile):
            rows, labels = _outcomes(logits, positions, targets[positions])
            known = knows(rows, labels)
            if bool(known.any()):
                yield rows[known], labels[known]

    def _batches(self) -> Iterator[Batch]:
        """This rank's batches; every rank has the same number, for `forward` may be a collective."""
        split = self.data.splits.get(self.asked.split)
        if split is None:
            return
        yield from batches_of(split, self._chosen(split), self.batch, self.context.dist, most=None)

    def _chosen(self, split: Split) -> np.ndarray:
        """The texts that are read, spread over the split."""
        most = self.asked.examples
        if split.labels is None:
            most = min(most, max(16, int(_TOKENS / max(split.lengths.mean(), 1))))
        return spread(labelled(split), most)


def _of_classes(calibration: Calibration, classes: int) -> Calibration:
    """With biases relative to that of "other", which has none: a softmax knows differences alone."""
    *biases, last = calibration.bias or (0.0,)
    return replace(calibration, bias=tuple(b - last for b in biases)) if len(biases) == classes else calibration


def _outcomes(logits: Logits, index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and labels at some positions; the last column is the tail of a cache, or a specialist's "other".

    A specialist's temperature divides its "other" as well, which weightings read. So the fit looks at it, too: it is
    what the specialist should answer where the label is none of its classes.
    """
    if isinstance(logits, DenseLogits) and logits.other is not None:
        rows, other = logits.rows(index), logits.other[index].float().logsumexp(-1, keepdim=True)  # [m,C], [m,1]
        return torch.cat([rows, other], -1), torch.where(knows(rows, labels), labels, rows.shape[-1])
    if not isinstance(logits, SparseLogits):
        return logits.rows(index), labels
    known = logits.sparse(index)
    assert known.tail is not None, "the plan refuses caches of draws"
    rows = known.temperature * torch.cat([known.log_probs, known.tail[:, None]], -1)  # [m,k+1]
    hits = known.ids == labels[:, None]
    place = torch.where(hits.any(-1), hits.int().argmax(-1), known.ids.shape[1])
    return rows, place
