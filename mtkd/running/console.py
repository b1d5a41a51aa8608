"""Show the progress of a stage."""

from __future__ import annotations

import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtkd.data.progress import PATIENCE, PLAIN_INTERVAL, console, say


class StageProgress:
    """Rate, loss and time left of a stage.

    Args:
        name: of the stage.
        steps: all steps of the stage; an earlier session made `done` of them.
        main: whether this rank shows anything.
        unit: name of a step.
    """

    def __init__(self, name: str, steps: int, done: int, main: bool, unit: str = "step") -> None:
        self._name, self._steps, self._main, self._unit = name, steps, main, unit
        self._begun, self._first, self._step = time.monotonic(), done, done
        self._spoke = self._first_word = self._begun
        self._bar: Progress | None = None
        if main and console.is_terminal:
            columns = (
                TextColumn("  {task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(name, total=steps, completed=done, note="")

    def __enter__(self) -> StageProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def skip(self, step: int) -> None:
        """Report `step` steps as done, the new ones by an earlier session, so that they do not count in the rate."""
        self._first, self._step = self._first + step - self._step, step
        if self._bar:
            self._bar.reset(self._task, completed=step)

    def writing(self, longest: int, limit: int, tokens: int) -> None:
        """Show how far the answers of a step are that the student writes, where that takes long.

        Args:
            longest: tokens of the longest one so far, of at most `limit`.
            tokens: of all of them so far.
        """
        if not self._main:
            return
        now, text = time.monotonic(), f"writing: token {longest} of {limit}, {tokens:,} in all"
        if longest == 1:
            self._first_word = now
        if self._bar:
            if now - self._first_word > PATIENCE:  # short ones would only flicker
                self._bar.update(self._task, note=text)
        elif now - self._spoke > PLAIN_INTERVAL:
            self._spoke = now
            say(f"  {self._name}: {self._unit} {self._step + 1}/{self._steps}  {text}")

    def update(self, step: int, loss: float | None, *, note: str = "") -> None:
        """Show that `step` steps are done; `loss` in nats when it was read at this step, or another short `note`."""
        self._step = step
        if not self._main:
            return
        now = time.monotonic()
        rate = (step - self._first) / max(now - self._begun, 1e-9)
        if self._bar:
            if loss is not None or note:
                text = note if loss is None else f"loss {loss:.3f}"
                self._bar.update(self._task, note=f"{text}  {rate:.1f} {self._unit}s/s")
            self._bar.update(self._task, completed=step)
        elif (loss is not None or note) and (now - self._spoke > PLAIN_INTERVAL or step == self._steps):
            self._spoke = now
            left = (self._steps - step) / max(rate, 1e-9)
            text, unit = note if loss is None else f"loss {loss:.4f}", self._unit
            say(f"  {self._name}: {unit} {step}/{self._steps}  {text}  {rate:.2f} {unit}s/s  {left:.0f} s left")
