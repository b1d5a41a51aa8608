"""Train a stage: the loop that every stage runs, under either engine."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from mtkd.config import RunConfig
from mtkd.data.batch import Batch, position_counts
from mtkd.data.progress import say
from mtkd.engine.base import all_finite, learning_rate
from mtkd.engine.dist import Dist
from mtkd.engine.folder import RunDir, StageDir
from mtkd.engine.jsonlines import ROLLOUT, to_json
from mtkd.engine.seal import Found, newest_sealed, save_sealed
from mtkd.engine.stopping import StopFlag, stop_flag
from mtkd.errors import DataError, NonFiniteError, Preempted, on_every_rank
from mtkd.objective.looks import after_step, before_step
from mtkd.running.build import BuiltStage
from mtkd.running.console import StageProgress
from mtkd.running.identity import check_checkpoint
from mtkd.running.metrics import Meter, MetricsLog
from mtkd.running.overflow import check_teachers
from mtkd.running.select import check_selection, note_score, take_best, validate
from mtkd.running.state import TrainState, regrouped

_STATE = "state.json"

Part = TypeVar("Part")


def train(built: BuiltStage, config: RunConfig, run: RunDir, folder: StageDir) -> dict[str, Any]:
    """Train a stage to its last step, resuming from its newest sealed checkpoint if there is one.

    Returns:
        Facts for the stage's DONE record: how long it trained, the step of the engine's model, why training ended.
    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite; nothing after the last finite step is saved.
        Preempted: SIGTERM or SIGINT arrived; a checkpoint was sealed.
        DataError: a checkpoint belongs to another configuration, teacher, data set or tokenizer.
    """
    check_selection(built)
    engine, dist, objective, state = built.engine, built.engine.dist, built.objective, _restore(built, folder)
    meter = Meter(built, dist, state)
    with (
        stop_flag() as stopped,
        MetricsLog(run, built.name, dist, state.step) as log,
        StageProgress(built.name, built.steps, state.step, dist.is_main) as progress,
    ):
        session = _Session(built, config, folder, state, meter, log, stopped)
        built.watch(progress.writing)
        objective.train()
        for step in range(state.step, state.step if state.ended else built.steps):
            micro_batches = built.micro_batches(step)
            counts, stop = global_counts(micro_batches, dist, stopped(), objective.step_counts)
            parts = before_step(objective, built.pool, engine, step, micro_batches, counts)
            for batch, teachers in session.timed(parts):
                loss, metrics = engine.forward(batch, teachers, counts)
                engine.backward(loss)
                meter.add(metrics)
            norm = engine.step(step)
            session.check_finite(norm, micro_batches)  # before the step counts: no checkpoint may hold it
            after_step(objective, engine, micro_batches)
            session.count(counts)
            progress.update(state.step, session.log_if_due(norm))
            better = session.validate_if_due()
            session.save_if_due(stop or better)
            if stop:
                raise on_every_rank(_preempted(built, state))
            if session.ends:
                break
        if not dist.all_ok(not stopped()):  # a signal during the last step, which is saved: no later step asks for it
            raise on_every_rank(_preempted(built, state))
    return {
        "steps": state.step,
        "exported_step": take_best(built, folder, state),
        "ended": state.ended or "all steps",
        "seconds": state.seconds,
        "tokens": state.targets,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
    }


class _Session:
    """The work of one process between the optimizer steps of a stage: count, log, validate, save."""

    def __init__(
        self,
        built: BuiltStage,
        config: RunConfig,
        folder: StageDir,
        state: TrainState,
        meter: Meter,
        log: MetricsLog,
        stopped: StopFlag,
    ) -> None:
        self._built, self._config, self._folder, self._state = built, config, folder, state
        self._meter, self._log, self._stopped = meter, log, stopped
        self._spent, self._lap = {"scoring": 0.0, "learning": 0.0}, time.monotonic()
        self._start_clock()

    def _start_clock(self) -> None:
        """Validation and saving are not training time: equal_time compares what the steps alone took."""
        self._begun = time.monotonic() - self._state.seconds

    def timed(self, micro_batches: Iterable[Part]) -> Iterator[Part]:
        """The same micro-batches; what passes before each is the teachers' time, and after it the student's."""
        self._spent, self._lap = {"scoring": 0.0, "learning": 0.0}, time.monotonic()
        for micro_batch in micro_batches:
            self._end("scoring")
            yield micro_batch
            self._end("learning")

    def _end(self, part: str) -> None:
        now = time.monotonic()
        self._spent[part] += now - self._lap
        self._lap = now

    @property
    def _is_last(self) -> bool:
        return self._state.step == self._built.steps

    @property
    def _validates(self) -> bool:
        every = self._built.stage.evaluate_every
        return self._is_last or bool(every and self._state.step % every == 0)

    @property
    def ends(self) -> bool:
        """Whether no further step is made: after the last one, or where a validation score says so."""
        return self._is_last or bool(self._state.ended)

    def check_finite(self, norm: float, micro_batches: list[Batch]) -> None:
        """Refuse a gradient that is not finite, before anything of the step is counted. A collective.

        Raises:
            NonFiniteError: naming the teacher that gave such numbers, else what was measured.
        """
        if math.isfinite(norm):
            return
        check_teachers(self._built, micro_batches, torch.bfloat16 if self._config.engine.in_bf16 else torch.float32)
        raise on_every_rank(_non_finite(self._built, self._state.step, self._meter.flush()))

    def count(self, counts: Mapping[str, int]) -> None:
        """Count a finished step in the state; `counts`: its positions over all ranks."""
        state = self._state
        state.step, state.stream = state.step + 1, self._built.stream.state()
        state.seconds, state.targets = time.monotonic() - self._begun, state.targets + counts["targets"]
        self._end("learning")
        if (rollout := self._built.rollout) is not None:
            self._meter.note({ROLLOUT + name: value for name, value in {**rollout.facts, **self._spent}.items()})

    def log_if_due(self, norm: float) -> float | None:
        """Log the means since the last line, and return their loss; None where no line is due. A collective.

        Raises:
            NonFiniteError: that loss is not finite.
        """
        state, stage = self._state, self._built.stage
        before_a_choice = self._validates and stage.early_stop  # the report shows both losses of such a step
        if not (self._is_last or state.step == 1 or state.step % self._config.log_every == 0 or before_a_choice):
            return None
        means = self._meter.flush()
        rate = learning_rate(stage.optimizer, state.step - 1, self._built.steps)  # of the step that is done
        facts = {"seconds": round(state.seconds, 3), "tokens": state.targets}
        self._log.log(state.step, {"lr": rate, "grad_norm": norm, **means}, facts)
        if not math.isfinite(means["loss"]):
            raise on_every_rank(_non_finite(self._built, state.step - 1, {"loss": means["loss"]}))
        return means["loss"]

    def validate_if_due(self) -> bool:
        """Validate where it is due; true if the step must be kept as the best so far. A collective."""
        if not self._validates:
            return False
        better = note_score(self._built, self._state, validate(self._built, self._log, self._state.step))
        self._start_clock()
        return better

    def save_if_due(self, must: bool) -> None:
        """Seal a checkpoint where one is due, after the log lines are on the disk. A collective."""
        every = self._built.stage.save_every
        if not (must or self.ends or (every and self._state.step % every == 0)):
            return
        self._log.sync()  # first: a resume drops lines after the checkpoint, but cannot restore lost ones
        with self._stopped.writing():
            _save(self._built, self._folder, self._state, self._meter)
        self._start_clock()


def global_counts(
    micro_batches: list[Batch], dist: Dist, stop: bool = False, more: Callable[[Batch], Mapping[str, int]] | None = None
) -> tuple[dict[str, int], bool]:
    """Valid positions over all ranks and micro-batches of a step, and whether any rank wants to stop.

    One small all-reduce: what divides every row, so that 8x1, 4x2 and 2 ranks give the same gradient.

    Args:
        stop: of this rank.
        more: further numbers of a micro-batch, under the same names on every rank.
    """
    counts = position_counts(micro_batches)
    for batch in micro_batches:
        for name, number in (more(batch) if more else {}).items():
            counts[name] = counts.get(name, 0) + number
    *sums, stops = dist.sum([*counts.values(), int(stop)])
    return dict(zip(counts, map(int, sums), strict=True)), stops > 0


def _save(built: BuiltStage, folder: StageDir, state: TrainState, meter: Meter) -> None:
    """Seal a checkpoint.

    Raises:
        NonFiniteError: the parameters, or a loss since the last log line, are not finite. Nothing is written, so that
            a corrected run goes on from the last good checkpoint.
    """
    engine = built.engine
    # one look per checkpoint: at every step it would make a GPU wait
    if not engine.dist.all_ok(all_finite(built.objective) and meter.finite_loss()):
        raise on_every_rank(_non_finite(built, state.step - 1, meter.flush(), "a parameter"))
    state.meters = meter.states()

    def write(path: Path) -> None:
        built.engine.save(path)
        if built.rollout is not None:
            built.rollout.save(path, state.step)
        if built.engine.dist.is_main:
            (path / _STATE).write_text(to_json(asdict(state)))

    facts = {"step": state.step, "identity": built.identity, **built.layout}
    if built.stage.export == "best":
        facts["best"] = state.best_step  # `save_sealed` keeps the checkpoint that the newest ones refer to
    save_sealed(folder.checkpoints, state.step, write, facts, dist=built.engine.dist, keep=built.stage.keep)


def _restore(built: BuiltStage, folder: StageDir) -> TrainState:
    """The state of the newest sealed checkpoint, loaded into engine and stream; a fresh state when there is none."""
    dist = built.engine.dist
    newest = dist.broadcast_object(newest_sealed(folder.checkpoints) if dist.is_main else Found(None, {}, []))
    for reason in newest.skipped:
        say(f"  skipped a broken checkpoint: {reason}", main=dist.is_main)
    if newest.path is None:
        if newest.skipped:
            raise DataError(
                "checkpoints exist, but none of them is whole",
                where=str(folder.checkpoints),
                found="; ".join(newest.skipped),
                todo="remove this folder to train the stage from its beginning",
            )
        return TrainState()
    check_checkpoint(built.name, newest.manifest, built.identity, built.layout, newest.path)
    state = TrainState(**json.loads((newest.path / _STATE).read_text()))
    state.meters = regrouped(state.meters, dist.world_size)
    built.engine.load(newest.path)
    built.stream.load_state(state.stream)
    if built.rollout is not None:
        built.rollout.load(newest.path, state.step)
    say(f"  resumed at step {state.step} from {newest.path.name}", main=dist.is_main)
    return state


def _non_finite(
    built: BuiltStage, step: int, metrics: dict[str, float], else_found: str = "the gradient's norm"
) -> NonFiniteError:
    bad = sorted(name for name, value in metrics.items() if not math.isfinite(value))
    return NonFiniteError(
        f"a loss or gradient is not finite at step {step + 1}",
        where=f"stages.{built.name}",
        found=", ".join(bad) or else_found,
        todo="lower optimizer.lr, or set optimizer.clip; the last sealed checkpoint is finite",
    )


def _preempted(built: BuiltStage, state: TrainState) -> Preempted:
    return Preempted(
        f"stopped and saved at step {state.step} of {built.steps}",
        where=f"stages.{built.name}",
        todo="run it again (without --redo) to go on from there",
    )
