"""What the system refused, in words: the file and, where a disk is full, which folder it is and how much is free."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from mtkd.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# Compilers and libraries pass the system's words on, not its number.
_WORDS = (os.strerror(errno.ENOSPC), os.strerror(errno.EDQUOT), "No usable temporary directory")


def refused(error: OSError) -> UserError:
    """The error for a file or folder that the system refused."""
    return full_disk(error) or UserError(
        f"the system refused it: {error.strerror or error}",
        where=str(error.filename or ""),
        todo="look at this file or folder, its rights and the free space, and try again",
    )


def full_disk(error: BaseException) -> UserError | None:
    """The error for a full disk, if one is the cause of `error`; else None."""
    for one in _chain(error):
        if getattr(one, "errno", None) in _FULL or any(word in str(one) for word in _WORDS):
            file = getattr(one, "filename", None)
            folder = Path(os.fsdecode(file)).parent if isinstance(file, str | bytes) else _temporary()
            free = dict.fromkeys(map(_free, (folder, _temporary())))
            words = next((line for line in str(one).splitlines() if any(word in line for word in _WORDS)), str(one))
            return UserError(
                "a disk is full: something could not be written",
                where=str(folder),
                found="\n           ".join((words.strip(), *free)),
                todo="make room there, or set TMPDIR to a folder on another disk, and run it again",
            )
    return None


def free_disk(folder: Path) -> tuple[Path, int]:
    """(the nearest folder above that exists, bytes free there)."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    return there, shutil.disk_usage(there).free


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _temporary() -> Path:
    """The folder for temporary files that was asked for; `tempfile` quietly takes another one when it is full."""
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _free(folder: Path) -> str:
    named = " (TMPDIR)" if str(folder) == os.environ.get("TMPDIR") else ""
    try:
        return f"{folder}{named}: {shutil.disk_usage(folder).free:,} bytes are free"
    except OSError as error:
        return f"{folder}{named}: {error.strerror}"
