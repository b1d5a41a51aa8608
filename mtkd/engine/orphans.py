"""No process of a run outlives the one that started it, not even when a launcher is killed."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

# From <linux/prctl.h>.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_SHELTERED = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_END_SECONDS = 60  # for a rank to save and leave after its launcher was killed
_LOOK_SECONDS = 0.5


def end_with_parent(sheltered: bool = False) -> Callable[[], None] | None:
    """For `preexec_fn`: the child is ended when this process ends, however it ends. None where Linux is not.

    Args:
        sheltered: SIGTERM, SIGHUP and SIGINT do not reach the child, nor its children until they call `leave_shelter`;
            its end is SIGKILL then. Slurm sends SIGTERM to all processes: DeepSpeed's launcher would kill ranks that
            need longer than 30 seconds to save.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)  # loaded before the fork

    def ask() -> None:
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if sheltered else signal.SIGTERM)
        if sheltered:
            signal.pthread_sigmask(signal.SIG_BLOCK, _SHELTERED)

    return ask


def leave_shelter() -> None:
    """Receive SIGTERM, SIGHUP and SIGINT again, those that came in the meantime too; for a rank."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SHELTERED)


@contextmanager
def adopting() -> Iterator[None]:
    """Within it this process becomes the parent of every process below it whose own parent ends."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else lambda option, value: None
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0)


def end_session(leader: int) -> None:
    """End what is left of a session whose leader has ended: SIGTERM, on which a rank saves, then SIGKILL."""
    import psutil

    left = [process for process in psutil.process_iter() if _session(process.pid) == leader]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        _, left = psutil.wait_procs(left, _END_SECONDS)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def stop_without_launcher() -> None:
    """Send this rank SIGTERM when its launcher has ended: it saves and ends, instead of going on unseen.

    Looked at by a thread, since the kernel's signal comes when the launcher's *thread* ends.
    """
    import psutil

    above = _launchers()

    def look() -> None:
        while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in above):
            time.sleep(_LOOK_SECONDS)

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            look()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="mtkd-parent", daemon=True).start()


def _launchers() -> list[psutil.Process]:
    """This rank's launcher, with what stands above it where that could be killed and the launcher would go on.

    That is DeepSpeed's outer launcher, or the ssh server with the shell that it started for one command. A shell in
    which a person types does not count: it may be left.
    """
    import psutil

    parents = psutil.Process().parents()
    launchers = parents[:1]
    for process in parents[1:4]:
        try:
            name, words = process.name(), process.cmdline()
        except psutil.Error:
            break
        launchers.append(process)
        if name.startswith("sshd") or any("deepspeed.launcher" in w or w.endswith("/deepspeed") for w in words):
            return launchers
        if words[1:2] != ["-c"]:
            break
    return parents[:1]
