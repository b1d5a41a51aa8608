"""Small files that survive a kill and show damage: atomic writes, and JSON records with their own digest.

A record is a JSON object with the sha256 of everything else in it. A flipped bit, half a file, or a value that was
changed by hand is then an error that names the file, never a number that is believed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mtkd.errors import DataError

TEMPORARY = ".tmp-"
FORMAT = 2
"""Of records and manifests; those of format 1 had no digest of themselves."""

_DIGEST = "sha256"
_MAX_BYTES = 1_000_000_000


class Checked(BaseModel):
    """Base of the forms that records are checked against: no coercion, no NaN; further fields are let pass."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace `path` by `data` so that after a kill it holds either the old or the new content, whole.

    Raises:
        OSError: with the name of `path`, also where writing aside was refused.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_object(path: Path, todo: str = "") -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        todo: what helps when it is damaged.
    Raises:
        FileNotFoundError: there is no such file.
        DataError: it cannot be read, or is anything else.
    """
    record = json_object(plain_bytes(path, todo))
    if record is None:
        raise DataError("the file is damaged: it is not a JSON object", where=str(path), todo=todo)
    return record


def record_text(values: Mapping[str, Any], **dump: Any) -> str:
    """A record as it stands in its file.

    Args:
        values: plain ones.
        dump: for `json.dumps`.
    """
    plain = {**json.loads(json.dumps(values)), "format": FORMAT}
    return json.dumps({**plain, _DIGEST: _digest(plain)}, indent=1, **dump) + "\n"


def write_record(path: Path, values: Mapping[str, Any]) -> None:
    """Write a record; atomic."""
    write_atomic(path, record_text(values))


def read_record(path: Path, form: type[BaseModel], todo: str = "", *, old: bool = True) -> dict[str, Any]:
    """The values of a record that is what was written, without its format and digest.

    Args:
        form: what they must be. todo: what helps when they are not.
        old: also accept one that was written before records had digests.
    Raises:
        FileNotFoundError: there is no such file.
        DataError: damaged, changed by hand, or of another form.
    """
    record = check_digest(read_object(path, todo), path, todo, old=old)
    values = {key: value for key, value in record.items() if key not in ("format", _DIGEST)}
    try:
        form.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"the file is damaged: {first['msg'][:1].lower()}{first['msg'][1:]}", where=f"{path}: {place}", todo=todo
        ) from None
    return values


def check_digest(record: dict[str, Any], path: Path, todo: str = "", *, old: bool = True) -> dict[str, Any]:
    """The same object, whose digest is right; one without any is of an older version.

    Args:
        todo, old: as `read_record` has them.

    Raises:
        DataError: it is not what was written.
    """
    if record.get("format") in (None, 1) and _DIGEST not in record:
        if old:
            return record
        raise DataError("the file has no digest: an older version wrote it", where=str(path), todo=todo)
    rest = {key: value for key, value in record.items() if key != _DIGEST}
    if record.get("format") != FORMAT:
        raise DataError(
            "the file is damaged, or of another version",
            where=f"{path}: format",
            found=repr(record.get("format"))[:60],
            allowed=FORMAT,
            todo=todo,
        )
    if record.get(_DIGEST) != _digest(rest):
        raise DataError("the file is damaged, or was changed: its digest differs (sha256)", where=str(path), todo=todo)
    return record


def plain_bytes(path: Path, todo: str = "") -> bytes:
    """The content of a plain file; a fifo would wait for ever, a device has no end."""
    try:
        if path.exists() and not path.is_file():
            raise DataError("not a plain file", where=str(path), todo=todo)
        if path.stat().st_size > _MAX_BYTES:
            raise DataError("the file is too large", where=str(path), todo=todo)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path), todo=todo) from None


def json_object(text: bytes) -> dict[str, Any] | None:
    """The JSON object of a text, None for anything else; text that cannot be written again (half characters) too."""
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
