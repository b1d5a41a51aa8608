"""The `files` source: local JSON, JSON lines, CSV, TSV, Parquet and text files, and which row of them is broken.

    .jsonl   one JSON object per line; blank lines are ignored
    .json    one JSON array of objects
    .csv     comma-separated with a header line, quoted as in RFC 4180; every value is text
    .tsv     tab-separated with a header line, a quotation mark is a character like any other; every value is text
    .parquet a table
    .txt     one document per block of lines, blocks being separated by blank lines; its only column is `text`

Every file is UTF-8 (a byte order mark is accepted). Rows are counted from 1 without the header, lines from 1 with it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.errors import DataError, UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig

EXTENSIONS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")


@dataclass(frozen=True)
class Origin:
    """Where the rows of a dataset were before any was left out, so that an error can name the user's own row.

    Attributes:
        name: the file as the user wrote it, or the source and split.
        rows: row number in the origin, counted from 0, [rows of the dataset].
        file: the local file, if it is one.
    """

    name: str
    rows: np.ndarray
    file: Path | None = None

    def where(self, index: int) -> str:
        """Name, row and (of a file with lines) line of a dataset row."""
        row = int(self.rows[index])
        line = line_of_row(self.file, row) if self.file else 0
        return f"{self.name}, row {row + 1}" + (f" (line {line})" if line else "")

    def select(self, indices: np.ndarray) -> Origin:
        """The origin of a selection of rows."""
        return Origin(self.name, self.rows[indices], self.file)


def find_files(config: DataConfig, base: Path, where: str = "data") -> dict[str, Path]:
    """Split -> existing file, looked for below `path` in the YAML file's folder `base`, then in the working directory.

    Raises:
        UserError: no file given, or an extension that is not read.
        DataError: a file that does not exist.
    """
    if not config.files:
        raise UserError(
            "source 'files' needs `files`", where=f"{where}.files", allowed="train, validation, test: a path each"
        )
    found: dict[str, Path] = {}
    for split in sorted(config.files, key=("train", "validation", "test").index):
        name = config.files[split]
        if Path(name).suffix.lower() not in EXTENSIONS:
            raise UserError(
                "this kind of file is not read", where=f"{where}.files.{split}", found=name, allowed=EXTENSIONS
            )
        places = [folder / (config.path or "") / name for folder in (base, Path.cwd())]
        existing = [place for place in places if place.is_file()]
        if not existing:
            raise DataError(
                "no such file",
                where=f"{where}.files.{split}",
                found=str(Path(config.path or "") / name),
                allowed="a path relative to the YAML file, or to the working directory",
            )
        found[split] = existing[0]
    return found


def file_digest(files: dict[str, Path]) -> str:
    """sha256 over the bytes of all files and the splits they are for."""
    digest = hashlib.sha256()
    for split, file in files.items():
        with file.open("rb") as stream:
            digest.update(f"{split}:{hashlib.file_digest(stream, 'sha256').hexdigest()};".encode())
    return digest.hexdigest()


def read_file(file: Path, name: str) -> Dataset:
    """A local file as a dataset in memory; `name` is how error messages call it.

    Raises:
        DataError: naming the file, the line or row, and what is wrong with it.
    """
    from datasets import Dataset

    extension = file.suffix.lower()
    if extension == ".txt":
        data = Dataset.from_dict({"text": [text for _, text in _blocks(file, name)]})
    elif extension in (".csv", ".tsv"):
        data = _read_table(file, name)
    else:
        data = _load(file, name)
    if not len(data):
        raise _no_rows(name)
    return data


def columns_of(file: Path) -> list[str] | None:
    """The column names, where they can be told from the beginning of the file; None where they cannot."""
    extension = file.suffix.lower()
    if extension == ".txt":
        return ["text"]
    if extension == ".parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(file).names)
        except (OSError, ValueError):
            return None
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if extension in (".csv", ".tsv"):
                return next(_records(stream, file))[1]
            first = json.loads(stream.readline()) if extension == ".jsonl" else None
            return list(first) if isinstance(first, dict) else None
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError, StopIteration):
        return None


def line_of_row(file: Path, row: int) -> int:
    """Line (from 1) at which a row (from 0) begins; 0 when the file has no lines to speak of."""
    extension = file.suffix.lower()
    starts: Iterator[int]
    if extension == ".jsonl":
        starts = (number for number, line in enumerate(_lines(file, file.name), start=1) if line.strip())
    elif extension == ".txt":
        starts = (number for number, _ in _blocks(file, file.name))
    elif extension in (".csv", ".tsv"):
        starts = (number for number, _ in _rows(file, file.name))
    else:
        return 0
    return next((line for position, line in enumerate(starts) if position == row), 0)


def require_column(rows: Dataset, column: str, origin: Origin, option: str) -> None:
    """Raise a DataError when a dataset lacks the column that an option names."""
    if column not in rows.column_names:
        raise DataError(
            f"no column '{column}'",
            where=origin.name,
            allowed=rows.column_names,
            todo=nearest(column, rows.column_names) or f"set `{option}` to one of its columns",
        )


def read_texts(rows: Dataset, column: str, origin: Origin, option: str) -> list[str]:
    """The texts of a column; raises a DataError naming the file and the first row that holds no text."""
    require_column(rows, column, origin, option)
    values: list[Any] = rows[column][:]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            found = "nothing" if value is None else value
            raise DataError(f"no text in column '{column}'", where=origin.where(row), found=found, allowed="text")
    return values


def _load(file: Path, name: str) -> Dataset:
    """JSON and Parquet through the loaders of `datasets`; nothing is left in its cache."""
    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    table = file.suffix.lower() == ".parquet"
    if not table:
        for _ in _lines(file, name):  # the JSON loader lets through what is not UTF-8, to fail where it is read
            pass
    read = Dataset.from_parquet if table else Dataset.from_json
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory(prefix="mtkd-data-") as cache:
            return read(str(file), cache_dir=cache, keep_in_memory=True)
    except Exception as error:
        if not table:
            diagnose_json(file, name)
        cause = error.__cause__ or error
        raise DataError(
            "the file cannot be read", where=name, found=f"{type(cause).__name__}: {str(cause).splitlines()[:1]}"
        ) from error
    finally:
        if shown:
            enable_progress_bar()


def diagnose_json(file: Path, name: str) -> None:
    """Raise a DataError for the first line or row that is not what the first one promised; quiet when all are fine."""
    kinds: dict[str, tuple[type, str]] = {}
    place = ""
    for place, value in _json_values(file, name):
        if not isinstance(value, dict):
            raise DataError("a row must be a JSON object", where=place, found=value, allowed='{"text": "...", ...}')
        for key, item in value.items():
            kind = float if isinstance(item, int | float) and not isinstance(item, bool) else type(item)
            if item is None:
                continue
            expected, first = kinds.setdefault(key, (kind, place))
            if kind is not expected:
                raise DataError(
                    f"column '{key}' changes its type", where=place, found=item, allowed=f"the type of {first}"
                )
    if not place:
        raise _no_rows(name)


def _json_values(file: Path, name: str) -> Iterator[tuple[str, Any]]:
    if file.suffix.lower() == ".jsonl":
        for number, line in enumerate(_lines(file, name), start=1):
            if line.strip():
                yield f"{name}, line {number}", _json(line, f"{name}, line {number}")
        return
    text = "\n".join(_lines(file, name))
    if not text.strip():
        return
    value = _json(text, name)
    if not isinstance(value, list):
        raise DataError("a .json file must hold one array of objects", where=name, found=type(value).__name__)
    for number, item in enumerate(value, start=1):
        yield f"{name}, row {number}", item


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        found = text if len(text) <= 80 else text[max(0, error.pos - 40) : error.pos + 40]
        where = place if "line" in place else f"{place}, line {error.lineno}"
        raise DataError(f"malformed JSON: {error.msg}, column {error.colno}", where=where, found=found) from error


def _no_rows(name: str) -> DataError:
    return DataError("the file has no rows", where=name, found="an empty file", todo="give a file with data")


def _read_table(file: Path, name: str) -> Dataset:
    from datasets import Dataset, Features, Value

    rows = _rows(file, name, header=True)
    header = next(rows, (0, []))[1]
    if not header or len(set(header)) < len(header) or not all(header):
        raise DataError("the header line must name every column once", where=f"{name}, line 1", found=header)
    columns: list[list[str]] = [[] for _ in header]
    for _, row in rows:
        for column, value in zip(columns, row, strict=True):
            column.append(value)
    features = Features({column: Value("string") for column in header})
    return Dataset.from_dict(dict(zip(header, columns, strict=True)), features=features)


def _rows(file: Path, name: str, header: bool = False) -> Iterator[tuple[int, list[str]]]:
    """The line a row begins at, and its values; every row has as many as the header. Blank lines are ignored."""
    records = _records((line + "\n" for line in _lines(file, name)), file)
    width, number = 0, 0
    try:
        for line, row in records:
            width = width or len(row)
            if len(row) != width:
                raise DataError(
                    "wrong number of columns",
                    where=f"{name}, row {number} (line {line})",
                    found=f"{len(row)} columns: {' | '.join(row)[:120]}",
                    allowed=f"{width} columns, as in the header",
                )
            if number or header:
                yield line, row
            number += 1
    except csv.Error as error:
        raise DataError(f"malformed row: {error}", where=f"{name}, after row {max(0, number - 1)}") from error


def _records(lines: Iterable[str], file: Path) -> Iterator[tuple[int, list[str]]]:
    """First line and values of every record of a CSV or TSV file, the header included."""
    if file.suffix.lower() == ".tsv":
        for number, line in enumerate(lines, start=1):
            if line.strip("\r\n"):
                yield number, line.strip("\r\n").split("\t")
        return
    csv.field_size_limit(2**31 - 1)  # characters; the default of 131,072 is less than a long document
    reader = csv.reader(lines, strict=True)
    begins = 1
    for record in reader:
        if record:
            yield begins, record
        begins = reader.line_num + 1


def _blocks(file: Path, name: str) -> Iterator[tuple[int, str]]:
    """First line and text of every block of lines that blank lines separate."""
    lines: list[str] = []
    for number, line in enumerate([*_lines(file, name), ""], start=1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield number - len(lines), "\n".join(lines)
            lines = []


def _lines(file: Path, name: str) -> Iterator[str]:
    """The lines without their ends.

    Raises:
        DataError: naming the first line that is not UTF-8.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not UTF-8 text: {error.reason} at byte {error.start + 1} of the line",
                    where=f"{name}, line {number}",
                    found=line[max(0, error.start - 20) : error.start + 20],
                    todo="convert the file to UTF-8",
                ) from error
            yield text.rstrip("\r\n")
