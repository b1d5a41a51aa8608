"""Open the models and caches of finished stages, after checking that they are bit for bit what was sealed.

DONE has the digest of the manifest, the manifest the digests of the files. Each process reads a file once before it is
loaded, and the shards of a cache when they are first mapped.
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
        name: of the stage.
        record: its DONE.
        part: member, or teacher of a cache; empty for the only model.
    Raises:
        DataError: it is not what the stage made.
    """
    try:
        _check_export(folder.export, record, part, None)
    except DataError as error:
        raise _not_sealed(error, f"stage '{name}'", redo_command([name])) from None
    return folder.export / part


def check_finished(name: str, folder: StageDir, record: Done) -> list[Path]:
    """Check what a finished stage made, also where no later stage loads it: users pass it on.

    All files are read where that takes seconds. Of larger exports and caches the small files are read, and the sizes of
    the others are compared.

    Args:
        name: of the stage.
        record: its DONE.
    Returns:
        Folders that were removed, for example to make room.
    Raises:
        DataError: as for `open_export`.
    """
    missing = []
    for part in record.parts:
        path = folder.export / part
        if not os.path.lexists(path):
            missing.append(path)
            continue
        try:
            _check_export(folder.export, record, part, 0)
            entries = read_manifest(path)["files"].values()
            verify_once(path, None if sum(entry["size"] for entry in entries) <= _LARGE else _SMALLEST)
        except DataError as error:
            raise _not_sealed(error, f"stage '{name}'", redo_command([name])) from None
    return missing


def check_foreign(folder: Path, largest: int | None = None) -> None:
    """Check a model folder that is the export of a run; any other folder passes.

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
    """The digest of the manifest of each part, for DONE."""
    return {part: manifest_digest(export / part) for part in parts}


def _check_export(export: Path, record: Done | None, part: str, largest: int | None) -> None:
    part = part if record and part in record.caches else ""
    digest = record.manifests.get(part) if record else None
    if digest is not None and manifest_digest(export / part) != digest:
        raise DataError("the manifest is not the one of what the stage made", where=str(export / part / MANIFEST))
    if record and not digest and not part and read_manifest(export).get("identity") != record.identity:
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
