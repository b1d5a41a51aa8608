"""Find the files that options of a plug-in name: their content is part of what the plug-in answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def named_files(options: Any, folders: Sequence[Path]) -> dict[str, str]:
    """Every text in options that names a file -> its sha256.

    Args:
        options: plain values, nested.
        folders: that a relative name may start from. The working directory counts where none of them has the file:
            with it an identity could change from shell to shell.
    """
    digests = {}
    for text in sorted(set(_texts(options))):
        files = {path.resolve() for folder in folders if _is_file(path := folder / text)}
        if not files and _is_file(Path(text)):
            files = {Path(text).resolve()}
        if files:
            digests[text] = "+".join(sorted({_sha256(file) for file in files}))
    return digests


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a text that no path can be: too long, or with a NUL
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
