"""Sum the metrics of a stage over micro-batches and ranks, and write them to every sink.

A line has the keys `stage`, `step`, `time` and the values by name; `mtkd.engine.jsonlines` has the prefixes of names.
A sink takes such values: metrics.jsonl always, TensorBoard where it is installed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from mtkd.engine.dist import Dist, on_main
from mtkd.engine.folder import RunDir
from mtkd.engine.jsonlines import append_jsonl, rewind, sync_jsonl
from mtkd.errors import UserError, on_every_rank
from mtkd.objective.objective import Objective
from mtkd.running.build import BuiltStage
from mtkd.running.rollout import rollout_metrics
from mtkd.running.state import TrainState
from mtkd.weightings.faults import FAULTS, check_faults


class Sink(Protocol):
    """A target of metrics, on the main rank."""

    def write(self, step: int, values: Mapping[str, float], facts: Mapping[str, float]) -> None:
        """Write the values of a step; `facts`: seconds and tokens so far."""
        ...

    def close(self) -> None: ...


class JsonLines:
    """metrics.jsonl, which the report and `mtkd status` read."""

    def __init__(self, file: Path, stage: str) -> None:
        self._file, self._stage = file, stage

    def write(self, step: int, values: Mapping[str, float], facts: Mapping[str, float]) -> None:
        append_jsonl(self._file, {"stage": self._stage, "step": step, "time": time.time(), **facts, **values})

    def close(self) -> None:
        pass


class TensorBoard:
    """Curves for TensorBoard, a folder per stage; those of a killed session end before `first`."""

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, step: int, values: Mapping[str, float], facts: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class MetricsLog:
    """All sinks of a stage; does nothing on other ranks than the main one.

    Args:
        done: the step that the stage goes on from; later lines are dropped, since their steps run again.
    """

    def __init__(self, run: RunDir, stage: str, dist: Dist, done: int) -> None:
        self._file, self._dist = run.metrics_file, dist
        self._sinks: list[Sink] = []
        on_main(dist, lambda: rewind(self._file, stage, done))
        if dist.is_main:
            self._sinks.append(JsonLines(self._file, stage))
            with suppress(ImportError):  # TensorBoard is an optional dependency
                self._sinks.append(TensorBoard(run.path / "tensorboard" / stage, done + 1))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks:
            sink.close()

    def log(self, step: int, values: Mapping[str, float], facts: Mapping[str, float] | None = None) -> None:
        """Write the values of a step."""
        for sink in self._sinks:
            sink.write(step, values, facts or {})

    def sync(self) -> None:
        """Bring the lines to the disk, so that no checkpoint is ahead of them. A collective."""
        on_main(self._dist, lambda: sync_jsonl(self._file))


class Meter:
    """Metrics of the steps since the last log line, summed on this rank, reduced over ranks when they are read."""

    def __init__(self, built: BuiltStage, dist: Dist, state: TrainState) -> None:
        self._name, self._dist = built.name, dist
        self._objective, self._weighting = built.objective, built.stage.weighting.name
        self._micro_batches, self._device = built.stage.batch.accumulate, built.engine.device
        before: dict[str, Any] = state.meters[dist.rank] if state.meters else {"sums": {}, "seen": 0}
        self._sums = {  # a checkpoint has null for NaN
            name: torch.tensor(math.nan if value is None else value, dtype=torch.float64, device=built.engine.device)
            for name, value in before["sums"].items()
        }
        self._seen: int = before["seen"]

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        """Add the metrics of a micro-batch; nothing waits for the device."""
        for name, value in metrics.items():
            self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()
        self._seen += 1

    def note(self, facts: Mapping[str, float]) -> None:
        """Add sums of this rank's whole step, under the same names on every rank; a log line has their means."""
        for name, value in facts.items():
            whole = torch.tensor(value, dtype=torch.float64, device=self._device)
            self._sums[name] = self._sums[name] + whole if name in self._sums else whole

    def finite_loss(self) -> bool:
        """Whether the losses of this rank since the last log line are finite: NaN and infinity stay in a sum."""
        return "loss" not in self._sums or math.isfinite(self._sums["loss"])

    def states(self) -> list[dict[str, Any]]:
        """The values for `TrainState.meters` on the main rank; empty elsewhere. A collective."""
        mine = {"sums": {name: float(value) for name, value in self._sums.items()}, "seen": self._seen}
        return self._dist.gather_objects(mine) or []

    def flush(self) -> dict[str, float]:
        """Means per step since the last flush, over all ranks.

        Raises:
            UserError: the teachers' weights are faulty; on every rank.
        """
        steps = max(self._seen // self._micro_batches, 1)
        values = torch.stack(list(self._sums.values())).tolist() if self._sums else []
        sums = self._dist.sum(values)
        means = {name: value / steps for name, value in zip(self._sums, sums, strict=True)}
        self._sums, self._seen = {}, 0
        if isinstance(self._objective, Objective):
            try:
                where, negative = f"stages.{self._name}.weighting", self._objective.weighting.negative
                check_faults(means, self._weighting, where, negative=negative)
            except UserError as error:
                raise on_every_rank(error) from None
        sound = {name: value for name, value in means.items() if name not in FAULTS}
        return rollout_metrics(sound, self._dist.world_size)
