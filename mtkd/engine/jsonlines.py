"""JSON that every reader takes, NaN and infinity as null; and files of JSON lines that outlive a killed writer."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtkd.engine.record import json_object, plain_bytes, write_atomic
from mtkd.errors import DataError

_ASIDE = "move aside what stands there: the file is written again as far as there is anything to write"


ROW, WEIGHT, VALIDATION, ROLLOUT, TEACHABLE = "row/", "weight/", "validation/", "rollout/", "teachable/"
"""What names in metrics.jsonl begin with: of a row's loss, of a teacher's mean weight, of a validation score, of what
the student wrote, and of the share of positions that a row selects."""


def to_json(value: Any, *, indent: int | None = None) -> str:
    """`value` as JSON; NaN and infinity become null."""
    return json.dumps(finite(value), indent=indent, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None for every NaN and infinity: JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line in one write; NaN and infinity become null, and half a line of a killed writer is cut away."""
    line = (json.dumps(finite(record), allow_nan=False) + "\n").encode()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            os.ftruncate(descriptor, path.read_bytes().rfind(b"\n") + 1)
        if os.write(descriptor, line) < len(line):
            raise OSError(errno.ENOSPC, "only part of a line could be written", str(path))
    finally:
        os.close(descriptor)


def sync_jsonl(path: Path) -> None:
    """Bring the lines to the disk, so that they do not fall behind a checkpoint when the machine loses its power."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def rewind(path: Path, stage: str, step: int) -> int:
    """Drop what a killed session logged of a stage beyond `step`, from where it is done again; atomic.

    Afterwards every step stands once and in order, also in a file of an older version, which logged steps twice: what
    came later counts. Lines of other stages stay as they are.

    Returns:
        The last step of the stage that is logged, 0 for none.
    Raises:
        DataError: no plain file, or it cannot be read.
    """
    data = plain_bytes(path, "move it aside: nothing but the curves comes from it") if path.exists() else b""
    whole = data[: data.rfind(b"\n") + 1]
    remaining: list[bytes] = []
    earliest, last, seen = step, 0, set[tuple[int, bool]]()
    for line in reversed(whole.splitlines(keepends=True)):
        record = json_object(line) or {}
        at = record.get("step")
        if record.get("stage") == stage and isinstance(at, int):
            kind = (at, any(key.startswith(VALIDATION) for key in record))
            if at > earliest or kind in seen:
                continue
            earliest, last = at, max(last, at)
            seen.add(kind)
        remaining.append(line)
    text = b"".join(reversed(remaining))
    if text != data:
        write_atomic(path, text)
    return last


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All records, none when there is no file; a last line without its end (a killed writer's) is left out.

    Raises:
        DataError: for any other line that is not a JSON object.
    """
    records = []
    for number, record in enumerate(_lines(path), 1):
        if record is None:
            raise DataError("not a JSON object", where=f"{path}:{number}")
        records.append(record)
    return records


def readable_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records that can be read, and the number of lines that cannot: for what is only shown."""
    lines = _lines(path)
    readable = [line for line in lines if line is not None]
    return readable, len(lines) - len(readable)


def _lines(path: Path) -> list[dict[str, Any] | None]:
    """Per finished line its record, None for one that is not a JSON object."""
    *lines, _unfinished = plain_bytes(path, _ASIDE).split(b"\n") if path.exists() else [b""]
    return [json_object(line) for line in lines]
