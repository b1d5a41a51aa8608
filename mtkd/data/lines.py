"""The lines of a data file: unpacked, UTF-8, and counted from 1."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from mtkd.data.paths import DataFile
from mtkd.data.progress import Working
from mtkd.errors import DataError

_TOLD_EVERY = 2_000
"""Lines between looks at the clock."""

_OTHER_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError)
_SAVE = "save it as UTF-8 (in a spreadsheet: CSV UTF-8; in a shell: iconv -f {} -t UTF-8)"


def read_lines(file: DataFile, *, shown: bool = False) -> Iterator[str]:
    """The lines without their ends, a byte order mark left out.

    Args:
        shown: say how far it is when it takes long.

    Raises:
        DataError: a line that is not UTF-8, or a compressed file that is damaged.
    """
    with opened(file) as (stream, raw), Working(f"reading {file.name}", file.path.stat().st_size, "bytes") as working:
        for number, line in enumerate(_unpacked(stream, file), start=1):
            if number == 1:
                _refuse_other_encodings(line, file)
            yield _decoded(line, number, file)
            if shown and number % _TOLD_EVERY == 0:
                working.at(raw.tell(), f"{number:,} lines")


@contextmanager
def opened(file: DataFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The unpacked bytes, and the file itself, whose position tells how much is read.

    Raises:
        DataError: it cannot be opened.
    """
    try:
        raw = file.path.open("rb")
    except OSError as error:
        raise DataError(f"the file cannot be opened: {error.strerror}", where=file.name) from error
    with raw:
        yield _stream(raw, file.packed), raw


def blocks(lines: Iterator[str]) -> Iterator[tuple[int, str]]:
    """First line and text of every block of lines that blank lines separate."""
    block: list[str] = []
    number = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), "\n".join(block)
            block = []
    if block:
        yield number + 1 - len(block), "\n".join(block)


def _stream(raw: IO[bytes], packed: str) -> IO[bytes]:
    if packed == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    if packed == ".bz2":
        return bz2.BZ2File(raw)
    if packed == ".xz":
        return lzma.LZMAFile(raw)
    if packed == ".zst":
        import pyarrow as pa  # Python has zstd from 3.14 on

        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), "zstd"))
    return raw


def _unpacked(stream: IO[bytes], file: DataFile) -> Iterator[bytes]:
    lines = iter(stream)
    while True:
        try:
            line = next(lines, None)
        except _DAMAGED as error:
            if not file.packed:
                raise
            raise DataError(
                f"the file cannot be unpacked: {error}",
                where=file.name,
                found=f"not the whole of a {file.packed} file, or damaged",
                todo="make it again; a file that is not compressed has no such ending",
            ) from error
        if line is None:
            return
        yield line


def _refuse_other_encodings(line: bytes, file: DataFile) -> None:
    coding = next((name for mark, name in _OTHER_MARKS.items() if line.startswith(mark)), "")
    if not coding and b"\0" in line:
        coding = "UTF-16"
    if coding:
        raise DataError(
            f"the file is {coding}, or no text at all",
            where=file.name,
            found=line[:20],
            allowed="UTF-8",
            todo=_SAVE.format(coding),
        )


def _decoded(line: bytes, number: int, file: DataFile) -> str:
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text: {error.reason} at byte {error.start + 1} of the line",
            where=f"{file.name}, line {number}",
            found=line[max(0, error.start - 20) : error.start + 20],
            todo=_SAVE.format("ISO-8859-1"),
        ) from error
    return text.rstrip("\r\n")
