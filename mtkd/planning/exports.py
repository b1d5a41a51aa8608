"""What stages have made, opened for loading: only what was sealed, bit for bit, and only by the stage that is asked.

DONE has the digest of the manifest, the manifest the digests of the files. Each file is read once per process before
it is loaded; the shards of a cache when they are first mapped.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mtkd.engine.folder import StageDir
from mtkd.engine.manifest import MANIFEST, manifest_digest, read_manifest, verify_once
from mtkd.engine.notes import Done
from mtkd.errors import DataError
from mtkd.planning.stages import redo_command

SMALL = 16_000_000
"""Bytes of a file that the plan reads; it compares only the sizes of larger ones."""

_LARGE, _SMALLEST = 1_000_000_000, 1_000_000
_EXPORT = re.compile(r".*/stages/\d{2,}-([^/]+)/export")


def open_export(name: str, folder: StageDir, record: Done, part: str = "") -> Path:
    """The folder of a finished stage's model, of one of its members, or of a cache.

    Args:
        name: of the stage. record: its DONE. part: member, or the teacher of a cache; empty for the only model.
    Raises:
        DataError: it is not what the stage made.
    """
    try:
        _check_export(folder.export, record, part, None)
    except DataError as error:
        raise _not_sealed(error, f"stage '{name}'", redo_command([name])) from None
    return folder.export / part


def check_finished(name: str, folder: StageDir, record: Done) -> list[Path]:
    """Look at what a finished stage made though no stage is to load it: what is passed on must be what was sealed.

    Every file is read when that takes seconds; of larger exports and caches the small files, and the sizes of others.

    Args:
        name: of the stage. record: its DONE.
    Returns:
        Folders that are gone: to make room, for example.
    Raises:
        DataError: as `open_export`.
    """
    gone = []
    for part in record.parts:
        made = folder.export / part
        if not os.path.lexists(made):
            gone.append(made)
            continue
        try:
            _check_export(folder.export, record, part, 0)
            entries = read_manifest(made)["files"].values()
            verify_once(made, None if sum(entry["size"] for entry in entries) <= _LARGE else _SMALLEST)
        except DataError as error:
            raise _not_sealed(error, f"stage '{name}'", redo_command([name])) from None
    return gone


def check_foreign(folder: Path, largest: int | None = None) -> None:
    """Check a model folder that is the export of some run; any other folder is let pass.

    Args:
        largest: bytes; of larger files only the size is compared.
    Raises:
        DataError: it is not what that run made.
    """
    folder = folder.resolve()
    for export in (folder, folder.parent):
        if match := _EXPORT.fullmatch(str(export)):
            run = export.parents[2]
            try:
                record = StageDir(export.parent).done()
                _check_export(export, record, "", largest)
            except DataError as error:
                raise _not_sealed(error, f"stage '{match[1]}'", f"mtkd resume {run} --redo {match[1]}") from None


def manifests(export: Path, parts: list[str]) -> dict[str, str]:
    """For DONE: the digest of the manifest of each part."""
    return {part: manifest_digest(export / part) for part in parts}


def _check_export(export: Path, record: Done | None, part: str, largest: int | None) -> None:
    part = part if record and part in record.caches else ""
    known = record.manifests.get(part) if record else None
    if known is not None and manifest_digest(export / part) != known:
        raise DataError("the manifest is not the one of what the stage made", where=str(export / part / MANIFEST))
    if record and not known and not part and read_manifest(export).get("identity") != record.identity:
        raise DataError("the manifest is that of another stage", where=str(export / MANIFEST))
    if not part:
        verify_once(export, largest)


def _not_sealed(error: DataError, made_by: str, command: str) -> DataError:
    return DataError(
        f"what {made_by} made is not what it sealed: {error.message}",
        where=error.where,
        found=error.found,
        allowed=error.allowed,
        todo=error.todo or f"put the file back, or make it again: {command}",
    )
