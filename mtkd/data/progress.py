"""What a person sees of work that takes long: a bar on a terminal, plain lines elsewhere; only the main rank speaks."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import ClassVar, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mtkd.errors import masked

console = Console(stderr=True)

T = TypeVar("T")

PLAIN_INTERVAL = 10.0
"""Seconds between plain lines: a log file stays readable."""

PATIENCE = 1.0
"""Seconds of work before it says how far it is."""


def say(text: str, *, main: bool = True) -> None:
    """One line for the person (on the main rank)."""
    if main:
        console.print(masked(text), highlight=False, markup=False, soft_wrap=True)


class Working:
    """How far a piece of work is that may take long, such as reading a file; short ones say nothing.

    On a terminal a bar that goes when the work is done; elsewhere plain lines. Only the main rank speaks: others read
    the same files. A piece of work within another one is silent.

    Args:
        what: the work, as in "reading a.jsonl".
        total: units of all of it; None where it is not known before the end.
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
        if not self._main or Working._outer is not self or now - self._begun < PATIENCE:
            return
        text = ", ".join(filter(None, (self._counted(done), note)))
        if console.is_terminal:
            self._shown(done, text)
        elif not self._spoke or now - self._spoke > PLAIN_INTERVAL:
            say(f"{self._what}: {text}, {now - self._begun:.0f} s so far")
            self._spoke = now

    def counting(self, items: Iterable[T], each: int = 1_000) -> Iterator[T]:
        """The items, which are the units.

        Args:
            each: items between two looks at the clock.
        """
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
    """The items, while a person sees how many of them are done.

    Args:
        each: items between two looks at the clock.
    """
    with Working(what, total, unit) as working:
        yield from working.counting(items, each)
