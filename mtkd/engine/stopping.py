"""SIGTERM and SIGHUP: a run that trains saves first (`mtkd.running.train`); elsewhere it ends at once, exit code 75.

Ending at once loses nothing: what counts on the disk is sealed or not there. A hang-up counts as SIGTERM, unless it is
ignored (`nohup`). In training SIGINT saves too, and a second one interrupts at once, but not what is being written.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mtkd.errors import Stopped

_arrived: list[int] = []


def stop_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a run to save and end; SIGINT, which a terminal sends, is not among them."""
    hang_up = getattr(signal, "SIGHUP", None)  # not on Windows
    if hang_up is None or signal.getsignal(hang_up) is signal.SIG_IGN:
        return (signal.SIGTERM,)
    return (signal.SIGTERM, hang_up)


def end_on_signals() -> None:
    """From here on a stop signal raises `Stopped`, once: a second one must not interrupt the way out."""
    for number in stop_signals():
        signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    _arrived.append(number)
    if len(_arrived) == 1:
        raise Stopped(f"stopped by {signal.Signals(number).name}")


class StopFlag:
    """Whether a signal asked to save and end."""

    def __init__(self) -> None:
        self._asked = self._writing = False

    def __call__(self) -> bool:
        return self._asked

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. A second SIGINT raises KeyboardInterrupt, unless it comes while something is written."""
        if number == signal.SIGINT and self._asked and not self._writing:
            raise KeyboardInterrupt
        self._asked = True

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Within it no signal interrupts: a checkpoint would be lost, and what was learned since the one before."""
        self._writing = True
        try:
            yield
        finally:
            self._writing = False


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """A flag that SIGTERM, SIGHUP and SIGINT set."""
    flag = StopFlag()
    try:
        before = {number: signal.signal(number, flag.remember) for number in (*stop_signals(), signal.SIGINT)}
    except ValueError:  # not the main thread (a notebook, a test): signals stay as they are
        before = {}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
