"""What a person sees during a run: progress bars on a terminal, plain lines elsewhere; only the main rank speaks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mtkd.secret import masked

console = Console(stderr=True)

T = TypeVar("T")

_PLAIN_INTERVAL = 10.0
"""Seconds between plain lines: a log file stays readable."""

_PATIENCE = 1.0
"""Seconds of work before it says how far it is."""


def say(text: str, *, main: bool = True) -> None:
    """One line for the person (on the main rank)."""
    if main:
        console.print(masked(text), highlight=False, markup=False, soft_wrap=True)


class StageProgress:
    """Rate, loss and time left of a stage.

    Args:
        name: of the stage.
        steps: all of them; `done` of these were made by an earlier session.
        main: whether this rank shows anything.
        unit: what a step is.
    """

    def __init__(self, name: str, steps: int, done: int, main: bool, unit: str = "step") -> None:
        self._name, self._steps, self._main, self._unit = name, steps, main, unit
        self._begun, self._first, self._step = time.monotonic(), done, done
        self._spoke = self._begun
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
        """`step` steps are done, those since the last report by an earlier session: they do not count in the rate."""
        self._first, self._step = self._first + step - self._step, step
        if self._bar:
            self._bar.reset(self._task, completed=step)

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
        elif (loss is not None or note) and (now - self._spoke > _PLAIN_INTERVAL or step == self._steps):
            self._spoke = now
            left = (self._steps - step) / max(rate, 1e-9)
            text, unit = note if loss is None else f"loss {loss:.4f}", self._unit
            say(f"  {self._name}: {unit} {step}/{self._steps}  {text}  {rate:.2f} {unit}s/s  {left:.0f} s left")


class Working:
    """How far a piece of work is that may take long, such as reading a file; short ones say nothing.

    On a terminal a bar that goes when the work is done; elsewhere plain lines. Only the main rank speaks: others read
    the same files. A piece of work within another one is silent.

    Args:
        what: the work, as in "reading a.jsonl".
        total: units of all of it; None where nobody knows before the end.
        unit: what is counted; "bytes" are shown as MB.
    """

    _outer: ClassVar[Working | None] = None

    def __init__(self, what: str, total: int | None, unit: str = "rows") -> None:
        self._what, self._total, self._unit = what, total, unit
        self._main = os.environ.get("RANK", "0") == "0"
        self._begun, self._spoke = time.monotonic(), 0.0
        self._bar: Progress | None = None

    def __enter__(self) -> Working:
        Working._outer = Working._outer or self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if Working._outer is self:
            Working._outer = None
        if self._bar:
            self._bar.stop()
        if self._spoke and kind is None:
            say(f"{self._what}: done in {time.monotonic() - self._begun:.0f} s")

    def at(self, done: int, note: str = "") -> None:
        """`done` units are done; `note` says more, such as the rows in so many bytes."""
        now = time.monotonic()
        if not self._main or Working._outer is not self or now - self._begun < _PATIENCE:
            return
        text = ", ".join(filter(None, (self._counted(done), note)))
        if console.is_terminal:
            self._shown(done, text)
        elif not self._spoke or now - self._spoke > _PLAIN_INTERVAL:
            say(f"{self._what}: {text}, {now - self._begun:.0f} s so far")
            self._spoke = now

    def counting(self, items: Iterable[T], each: int = 1_000) -> Iterator[T]:
        """The items, which are the units. Args: each: how many between looks at the clock."""
        for number, item in enumerate(items, start=1):
            yield item
            if number % each == 0:
                self.at(number)

    def _counted(self, done: int) -> str:
        scale, unit = (1e6, "MB") if self._unit == "bytes" else (1, self._unit)
        of = f" of {self._total / scale:,.0f}" if self._total else ""
        return f"{done / scale:,.0f}{of} {unit}"

    def _shown(self, done: int, text: str) -> None:
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
            self._task = self._bar.add_task(self._what, total=self._total, note="")
            self._bar.start()
        self._spoke = time.monotonic()
        self._bar.update(self._task, completed=done, note=text)


def counted(items: Iterable[T], what: str, total: int, unit: str = "rows", each: int = 1_000) -> Iterator[T]:
    """The items, while a person sees how many of them are done. Args: each: how many between looks at the clock."""
    with Working(what, total, unit) as working:
        yield from working.counting(items, each)
