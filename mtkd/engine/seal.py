"""Folders that survive a kill at any moment: written aside, sealed, renamed; checkpoints are such folders.

Only sealed folders are ever loaded; `latest` files and anything else that points somewhere are ignored.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtkd.engine.disk import free_disk
from mtkd.engine.dist import Dist, together
from mtkd.engine.manifest import MANIFEST, broken_files, check_seal, read_manifest, seal
from mtkd.engine.record import TEMPORARY as _TEMPORARY
from mtkd.engine.record import sync_folder, write_atomic
from mtkd.errors import DataError, UserError

__all__ = [
    "MANIFEST",
    "Found",
    "broken_files",
    "check_seal",
    "fault_point",
    "newest_sealed",
    "save_sealed",
    "seal",
    "sweep_left",
    "write_atomic",
    "write_sealed",
]

_TRASH = ".trash-"
_STEP = re.compile(r"step-(\d{6,})")
_DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that passed its check, None when there is none, and why newer ones were passed over."""

    path: Path | None
    manifest: dict[str, Any]
    skipped: list[str]


def newest_sealed(parent: Path) -> Found:
    """The newest usable checkpoint below `parent`.

    A caller that finds none but has `skipped` ones must say so: never a silent restart.
    """
    skipped: list[str] = []
    for path in _checkpoints(parent):
        try:
            manifest = check_seal(path)
        except DataError as error:
            skipped.append(str(error))
            continue
        if manifest.get("step") == _step_of(path):
            return Found(path, manifest, skipped)
        skipped.append(f"{path}: sealed as step {manifest.get('step')}, then renamed")
    return Found(None, {}, skipped)


def save_sealed(
    parent: Path,
    step: int,
    write: Callable[[Path], None],
    facts: Mapping[str, Any],
    *,
    dist: Dist,
    keep: int,
) -> Path:
    """Write, agree, seal, rename, prune: a checkpoint that exists whole or not at all. A collective.

    Args:
        parent: folder of the stage's checkpoints.
        step: optimizer steps done.
        write: writes this rank's files into the given folder.
        facts: for the manifest; `step` is added. ``best`` is the step of another checkpoint that this one refers to.
        keep: newest sealed checkpoints that stay, and those that they refer to.
    Returns:
        The sealed folder ``parent/step-000500``.
    Raises:
        UserError: on every rank when one of them could not write; the earlier checkpoints are untouched.
    """
    final = parent / f"step-{step:06d}"
    temporary = parent / f"{_TEMPORARY}{final.name}"
    _together(dist, temporary, lambda: _prepare(temporary) if dist.is_main else None)
    fault_point("before-shard", step)
    _together(dist, temporary, lambda: write(temporary))
    fault_point("after-shard", step)
    _together(dist, temporary, lambda: _finish(temporary, final, {**facts, "step": step}) if dist.is_main else None)
    if dist.is_main:
        _prune(parent, keep)
    return final


def write_sealed(final: Path, write: Callable[[Path], None], facts: Mapping[str, Any]) -> None:
    """Write a folder aside, seal it and put it in the place of `final`; for one process."""
    temporary = final.with_name(f"{_TEMPORARY}{final.name}")
    for stale in (temporary, final.with_name(f"{_TRASH}{final.name}")):
        remove(stale)
    temporary.mkdir(parents=True)
    write(temporary)
    seal(temporary, facts)
    _replace(temporary, final)


def _together(dist: Dist, temporary: Path, job: Callable[[], None]) -> None:
    """Do `job` on this rank; when it fails on one rank, raise on all of them with the same message."""

    def failed(message: str) -> UserError:
        return UserError(
            f"the checkpoint could not be written: {message}",
            where=str(temporary.parent),
            todo="fix the cause and resume; earlier checkpoints are untouched",
        )

    try:
        together(dist, job, failed, lambda error: _reason(error, temporary))
    except Exception:
        if dist.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _reason(error: Exception, temporary: Path) -> str:
    """The error in words; for a full disk (torch says RuntimeError) with the bytes there are and the bytes it takes."""
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, RuntimeError) and getattr(error, "errno", None) not in _DISK_FULL:
        return text
    written = sum(path.stat().st_size for path in temporary.rglob("*") if path.is_file()) if temporary.is_dir() else 0
    before = 0
    with suppress(DataError, StopIteration):
        before = sum(entry["size"] for entry in read_manifest(next(_checkpoints(temporary.parent)))["files"].values())
    _, free = free_disk(temporary.parent)
    return f"{text} (free: {free:,} bytes; needed: at least {max(before, written + 1):,} bytes)"


def _prepare(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    for path in temporary.parent.iterdir():
        if path.name.startswith((_TEMPORARY, _TRASH)):
            remove(path)
    temporary.mkdir()


def _finish(temporary: Path, final: Path, facts: Mapping[str, Any]) -> None:
    step = _step_of(final)
    fault_point("before-manifest", step)
    seal(temporary, facts)
    fault_point("after-manifest", step)
    _replace(temporary, final)
    fault_point("after-rename", step)


def _replace(temporary: Path, final: Path) -> None:
    """Rename into place; a folder that is there (a broken one, done again) goes first."""
    trash = final.with_name(f"{_TRASH}{final.name}")
    if os.path.lexists(final):
        final.rename(trash)
    temporary.rename(final)
    sync_folder(final.parent)
    remove(trash)


def _prune(parent: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` sealed checkpoints, but for those that they refer to as their best.

    A failure to do so does not stop a run.
    """
    sealed = 0
    needed = set()
    for path in _checkpoints(parent):
        if sealed >= keep:
            if _step_of(path) in needed:
                continue
            trash = path.with_name(f"{_TRASH}{path.name}")
            try:
                # Renamed first: half of a removed folder must not look like a checkpoint.
                path.rename(trash)
                fault_point("while-pruning", _step_of(path))
                remove(trash)
            except OSError as error:
                _log.warning("%s could not be removed: %s", path, error)
            continue
        with suppress(DataError):
            needed.add(check_seal(path, digests=False).get("best"))
            sealed += 1


def sweep_left(folder: Path) -> None:
    """Remove what killed processes were writing or removing below `folder`; under the run's lock.

    A file that a living process writes stays: `mtkd report` needs no lock.
    """
    for path in sorted(folder.rglob(".t*-*")):
        if path.name.startswith((_TEMPORARY, _TRASH)) and not _is_written(path):
            remove(path)


def _is_written(path: Path) -> bool:
    """Whether the process at the end of a temporary file's name lives, and is not this one."""
    import psutil

    number = path.name.rpartition("-")[2]
    return path.is_file() and number.isdecimal() and int(number) != os.getpid() and psutil.pid_exists(int(number))


def fault_point(name: str, step: int) -> None:
    """Die here when a test says so: ``MTKD_TEST_KILL_AT=after-shard`` or ``=after-shard@500`` (only at that step).

    The promise "a kill at any moment loses nothing that was sealed" can only be tested by real kills at known moments
    of the real code; from outside, the window between two system calls cannot be hit.
    """
    if os.environ.get("MTKD_TEST_KILL_AT") in (name, f"{name}@{step}"):
        os.kill(os.getpid(), signal.SIGKILL)


def _checkpoints(parent: Path) -> Iterator[Path]:
    """Folders named like a checkpoint, newest first."""
    paths = [p for p in parent.iterdir() if _STEP.fullmatch(p.name)] if parent.is_dir() else []
    yield from sorted(paths, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def remove(path: Path) -> None:
    """Remove a file or a folder, or a link or fifo that stands in its place; nothing where there is nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:  # a file, or what is there in its place: a link, a fifo
        path.unlink(missing_ok=True)
