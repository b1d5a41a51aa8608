"""The lock of a run's folder: one process works in it, and others may ask which.

flock is the kernel's: it ends with its process, however that ends. The text in the file is for people alone.
"""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from mtkd.errors import DataError, UserError


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Hold the run whose lock is `file` for this process.

    Raises:
        UserError: another process holds it; with its process id, host and start time.
        DataError: the lock is no plain file; a fifo can be waited for without an end.
    """
    if file.exists() and not file.is_file():
        raise DataError("the lock is not a plain file", where=str(file), todo="remove it")
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    try:
        _take(descriptor, file.parent)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} on {socket.gethostname()}, started {started}\n".encode(), 0)
        try:
            yield
        finally:
            # The file stays: if it were removed, two processes could hold locks on two files of this name.
            os.ftruncate(descriptor, 0)
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: forked children have copies
    finally:
        os.close(descriptor)


def holder(file: Path) -> str | None:
    """What the process that holds the lock says of itself; None where no process does.

    The text outlives a killed process, the lock does not. Reading needs no right to write, and several may ask at once.
    """
    if not file.is_file():  # a fifo would be waited for
        return None
    with file.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return stream.read().strip()
        fcntl.flock(stream, fcntl.LOCK_UN)
    return None


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(descriptor, 1000, 0).decode(errors="replace").strip()
        raise UserError(
            "another process is working in this run",
            where=str(folder),
            found=text or "a process that is just starting",
            todo="wait for it, end it, or give this run another name",
        ) from None
    except OSError as error:
        raise UserError(f"the folder cannot be locked: {error.strerror}", where=str(folder)) from None
