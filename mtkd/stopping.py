"""SIGTERM and SIGHUP: a run that trains saves first (`mtkd.train`); anywhere else it ends at once, with exit code 75.

Ending at once loses nothing: what counts on the disk is sealed or not there. A hang-up counts as SIGTERM, unless it is
ignored (`nohup`).
"""

from __future__ import annotations

import signal
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
