"""Sealed folders: a MANIFEST.json, written last, lists every file with size and sha256, and its own digest.

Only sealed folders are ever loaded. What differs from the manifest is an error that names the file: another bit, a
missing file, one too many, a link.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from mtkd.engine.record import check_digest, read_object, record_text, sync_folder, write_atomic
from mtkd.errors import DataError

MANIFEST = "MANIFEST.json"
_MAX_MANIFEST_BYTES = 64_000_000
_OWN = {"format", "files", "sha256"}

# Files whose digest was right in this process -> what they had then: size, time of change, number on the disk.
_right: dict[tuple[str, str], tuple[int, int, int]] = {}


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Bring every file of `folder` to the disk, then write its manifest as the last one.

    Args:
        facts: JSON values, e.g. step, world size, ZeRO stage, config digest, data fingerprint, versions. No times:
            equal content is to give an equal manifest. They stand next to the manifest's own fields.
    """
    files = {}
    for name, path in sorted(_files(folder)):
        if name == MANIFEST:
            continue
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            files[name] = {"size": os.fstat(file.fileno()).st_size, "sha256": digest}
    for parent, _, _ in os.walk(folder):
        sync_folder(Path(parent))
    assert not _OWN & facts.keys()
    write_atomic(folder / MANIFEST, record_text({**facts, "files": files}, sort_keys=True, allow_nan=False))


def check_seal(folder: Path, *, digests: bool = True, shared: bool = False) -> dict[str, Any]:
    """The manifest (``files`` and the facts) of a folder that is exactly what was sealed.

    Args:
        digests: False looks at names and sizes only, without reading the files.
        shared: plain numbers, which may be another user's.
    Raises:
        DataError: with the file and the reason. Files of another user are refused else: an optimizer's shards are
            pickles, so a checkpoint is code.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise DataError("not a folder", where=str(folder))
    for path in () if shared else (folder, *(path for _, path in _files(folder))):
        _check_owner(path)
    manifest = read_manifest(folder)
    for name, path in _files(folder):
        if name not in {MANIFEST, *manifest["files"]}:
            raise DataError("the file is not in the manifest", where=str(path))
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry, digests)
    return manifest


def verify_once(folder: Path, largest: int | None = None) -> dict[str, Any]:
    """`check_seal` of plain files that are about to be loaded; each file is read once per process, until it changes.

    Args:
        largest: bytes; of larger files only the size is compared.
    """
    manifest = check_seal(folder, digests=False, shared=True)
    for name, entry in manifest["files"].items():
        if largest is None or entry["size"] <= largest:
            _check_once(folder / name, entry)
    return manifest


def verify_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    """Compare one file with its entry in the manifest; once per process.

    Raises:
        DataError: it differs.
    """
    _check_once(folder / name, manifest["files"][name])


def check_bytes(path: Path, entry: Mapping[str, Any], content: memoryview) -> None:
    """Compare what was read, or mapped, of a file with its entry in the manifest; once per process.

    Raises:
        DataError: it differs.
    """
    key, mark = (str(path), entry["sha256"]), _mark(path)
    if _right.get(key) != mark:
        if hashlib.sha256(content).hexdigest() != entry["sha256"]:
            raise DataError("the content differs from what was sealed (sha256)", where=str(path))
        _right[key] = mark


def manifest_digest(folder: Path) -> str:
    """What identifies a sealed folder: the digest of its manifest, which has those of every file.

    Raises:
        DataError: it has none.
    """
    return hashlib.sha256(_manifest_file(folder).read_bytes()).hexdigest()


def broken_files(folder: Path) -> list[str]:
    """``file: reason`` of every listed file that is missing or not what was sealed; [] without a usable manifest."""
    problems = []
    with suppress(DataError):
        for name, entry in read_manifest(folder)["files"].items():
            try:
                _check_file(folder / name, entry, digests=True)
            except DataError as error:
                problems.append(f"{error.where}: {error.message}")
    return problems


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every field of the expected form and every name inside the folder; the files are not looked at.

    Raises:
        DataError: there is none, or it is not what was written.
    """
    path = _manifest_file(folder)
    if path.stat().st_size > _MAX_MANIFEST_BYTES:
        raise DataError("the manifest is too large", where=str(path))
    try:
        manifest = check_digest(read_object(path), path)
    except DataError as error:
        raise DataError(f"the manifest: {error.message}", where=error.where, found=error.found) from None
    if not isinstance(manifest.get("files"), dict):
        raise DataError("the manifest is malformed", where=str(path))
    for name, entry in manifest["files"].items():
        if name == MANIFEST or ".." in name.split("/") or str(PurePosixPath(name)) != name or name.startswith("/"):
            raise DataError("the manifest names a file outside the folder", where=str(path), found=name)
        valid = isinstance(entry, dict) and isinstance(entry.get("size"), int) and isinstance(entry.get("sha256"), str)
        if not valid:
            raise DataError("the manifest is malformed", where=str(path), found=name)
    return manifest


def _manifest_file(folder: Path) -> Path:
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise DataError("the folder has no manifest: it was never sealed", where=str(folder))
    return path


def _check_file(path: Path, entry: Mapping[str, Any], digests: bool) -> None:
    if not path.is_file() or path.is_symlink():
        raise DataError("the file is missing", where=str(path))
    if (size := path.stat().st_size) != entry["size"]:
        raise DataError("wrong size", where=str(path), found=f"{size} bytes", allowed=f"{entry['size']} bytes")
    if digests:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise DataError("the content differs from what was sealed (sha256)", where=str(path))


def _check_once(path: Path, entry: Mapping[str, Any]) -> None:
    key, mark = (str(path), entry["sha256"]), _mark(path)
    if _right.get(key) != mark:
        _check_file(path, entry, digests=True)
        _right[key] = mark  # of before it was read: a file that changed meanwhile is read again


def _mark(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(relative name, path) of every file; links and special files are refused, they would lead outside."""
    for parent, folders, names in os.walk(folder):
        for name in folders + names:
            path = Path(parent) / name
            mode = path.lstat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise DataError("a link or special file in a sealed folder", where=str(path))
            if stat.S_ISREG(mode):
                yield path.relative_to(folder).as_posix(), path


def _check_owner(path: Path) -> None:
    if (owner := path.lstat().st_uid) != os.geteuid():
        raise DataError(
            "the file belongs to another user", where=str(path), found=f"uid {owner}", allowed=f"uid {os.geteuid()}"
        )
