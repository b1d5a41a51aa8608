"""CSV and TSV: the header line or the names given for it, columns that are an index, and rows with their lines."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import TYPE_CHECKING

from mtkd.data.lines import read_lines
from mtkd.data.paths import DataFile
from mtkd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

    from mtkd.config import DataConfig

Record = tuple[int, list[str]]
"""The line that a record begins at, and its values."""

ROWS_AT_ONCE = 20_000
_INDEX = re.compile(r"Unnamed: \d+(\.\d+)?(_level_\d+)?")
_MORE_SEPARATORS = {";": '";"', "\t": '"\\t"', "|": '"|"', ",": '","'}
_BOTH = "give every column a name of its own in the header line, or remove the header and name all with `columns`"


@dataclass(frozen=True)
class Header:
    """What the first line, or the configuration, says of a table.

    Attributes:
        names: of the columns, those of an index left out.
        index: how many of a row's first values are an index.
        unread: positions, after the index, of columns that are an index too.
        note: what is ignored, in words; "" for nothing.
        counted: the index counts the rows, and is longer than the header.
    """

    names: tuple[str, ...]
    index: int = 0
    unread: tuple[int, ...] = ()
    note: str = ""
    counted: bool = False

    @property
    def width(self) -> int:
        """Values of a row, the index included."""
        return self.index + len(self.names) + len(self.unread)

    def values(self, record: list[str]) -> list[str]:
        """The values that have a name."""
        after = record[self.index :]
        return [value for i, value in enumerate(after) if i not in self.unread] if self.unread else after


def read_table(file: DataFile) -> tuple[pa.Table, str]:
    """A table as text columns, and what of it is ignored.

    Raises:
        DataError: naming the line of what is wrong.
    """
    import pyarrow as pa

    header, records = _opened(file, shown=True)
    schema = pa.schema([(name, pa.string()) for name in header.names])
    rows = (header.values(values) for _, values in _checked(file, header, records))
    batches = []
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        columns = zip(*chunk, strict=True)
        batches.append(pa.table([pa.array(column, pa.string()) for column in columns], schema=schema))
    return (pa.concat_tables(batches) if batches else schema.empty_table()), header.note


def table_columns(file: DataFile) -> list[str] | None:
    """The names of the columns, or None where the beginning of the file does not tell."""
    try:
        return list(_opened(file)[0].names)
    except (DataError, csv.Error):
        return None


def table_rows(file: DataFile) -> Iterator[Record]:
    """Every row with the line that it begins at."""
    header, records = _opened(file)
    yield from _checked(file, header, records)


def separator_hint(file: DataFile, columns: Iterable[str]) -> str:
    """What to do about a table that seems to be separated by another character; "" where none stands out."""
    if not file.is_table:
        return ""
    names = [name for name in columns if name.strip()]
    own = _separator(file)
    for separator, written in _MORE_SEPARATORS.items():
        if len(names) == 1 and separator != own and separator in names[0]:
            return f"the header looks separated by {written}: set separator: {written}"
    return ""


def _separator(file: DataFile) -> str:
    return file.separator or ("\t" if file.kind == "tsv" else ",")


def _opened(file: DataFile, *, shown: bool = False) -> tuple[Header, Iterator[Record]]:
    """The header, and the records after it."""
    records = _records(file, shown)
    try:
        first = next(records, None)
        if first is None:
            raise DataError(
                "the file has no rows: not even a header line", where=file.name, todo="give a file with data"
            )
        if file.columns:
            _refuse_a_header(file, first[1])
            return Header(file.columns), chain([first], records)
        second = next(records, None)
    except csv.Error as error:
        raise _malformed(file, 0, error) from error
    rest = records if second is None else chain([second], records)
    return _header(file, first, second), rest


def _header(file: DataFile, first: Record, second: Record | None) -> Header:
    line, names = first
    place = f"{file.name}, line {line}"
    if re.fullmatch(r"sep=.", names[0].strip()) or names[0].strip() == "sep=":
        raise DataError(
            "the first line is a spreadsheet's note, not the header",
            where=place,
            found=",".join(names),
            todo="remove the line, and set `separator` to what it says",
        )
    nameless = next((i for i, name in enumerate(names) if name.strip()), len(names))
    unread = tuple(i - nameless for i, name in enumerate(names) if i >= nameless and _INDEX.fullmatch(name))
    columns = [name for name in names[nameless:] if not _INDEX.fullmatch(name)]
    _refuse_names(names[nameless:], columns, nameless, place)
    if not columns:
        raise DataError("the header line names no column", where=place, found=names, todo=_BOTH)
    if not nameless and second is not None and _counts(names, second):
        return Header(tuple(columns), 1, unread, "its first column, which has no name, is ignored: an index", True)
    return Header(tuple(columns), nameless, unread, _ignored(names, nameless, unread))


def _refuse_names(named: list[str], columns: list[str], before: int, place: str) -> None:
    """Refuse a column without a name behind one with a name, and two of one name."""
    for position, name in enumerate(named, start=before + 1):
        if not name.strip():
            problem = f"column {position} has no name"
        elif columns.count(name) > 1:
            problem = f"column '{name}' is there twice"
        else:
            continue
        raise DataError(f"the header line must name every column once: {problem}", where=place, found=named, todo=_BOTH)


def _ignored(names: list[str], nameless: int, unread: tuple[int, ...]) -> str:
    parts = ["its first column, which has no name,"] if nameless == 1 else []
    parts += [f"its first {nameless} columns, which have no names,"] if nameless > 1 else []
    parts += [f"column '{names[nameless + i]}'" for i in unread]
    if not parts:
        return ""
    return f"{' and '.join(parts).rstrip(',')} {'is' if nameless + len(unread) == 1 else 'are'} ignored: an index"


def _counts(names: list[str], second: Record) -> bool:
    """Whether rows begin with their number, which R's write.table writes without a name for it."""
    return len(second[1]) == len(names) + 1 and second[1][0] in ("0", "1")


def _refuse_a_header(file: DataFile, first: list[str]) -> None:
    if tuple(value.strip() for value in first) == file.columns:
        raise DataError(
            "the first line is a header", where=f"{file.name}, line 1", found=first, todo="drop `columns`, or the line"
        )


def _checked(file: DataFile, header: Header, records: Iterator[Record]) -> Iterator[Record]:
    """The rows, each as wide as the header; an index without a name in a shorter header must count."""
    number = 0
    begins: int | None = None
    try:
        for line, row in records:
            number += 1
            if len(row) != header.width:
                raise _wrong_width(file, header, number, line, row)
            if header.counted:
                begins = int(row[0]) if begins is None else begins
                if row[0] != str(begins + number - 1):
                    raise _wrong_width(file, header, number, line, row)
            yield line, row
    except csv.Error as error:
        raise _malformed(file, number, error) from error


def _wrong_width(file: DataFile, header: Header, number: int, line: int, row: list[str]) -> DataError:
    source = "as `columns` names" if file.columns else "as in the header"
    fewer = separator_hint(file, header.names) or (separator_hint(file, row) if len(row) == 1 else "")
    quoted = 'a value that holds the separator stands in quotation marks: "a, b"'
    return DataError(
        "wrong number of columns",
        where=f"{file.name}, row {number} (line {line})",
        found=f"{len(row)} columns: {' | '.join(row)[:120]}",
        allowed=f"{len(header.names) + len(header.unread)} columns, {source}",
        todo=fewer or (quoted if len(row) > header.width and _quoted(file) else ""),
    )


def _malformed(file: DataFile, number: int, error: csv.Error) -> DataError:
    return DataError(
        f"malformed row: {error}",
        where=f"{file.name}, after row {number}",
        todo='a quotation mark within a quoted value is doubled: "say ""yes"""',
    )


def _quoted(file: DataFile) -> bool:
    return file.kind == "csv" or bool(file.separator)


def _records(file: DataFile, shown: bool) -> Iterator[Record]:
    """First line and values of every record, the header included; blank lines are ignored."""
    lines = read_lines(file, shown=shown)
    if not _quoted(file):
        for number, line in enumerate(lines, start=1):
            if line:
                yield number, line.split("\t")
        return
    csv.field_size_limit(2**31 - 1)  # characters; the default of 131,072 is less than a long document
    reader = csv.reader((line + "\n" for line in lines), strict=True, delimiter=_separator(file))
    begins = 1
    for record in reader:
        if record:
            yield begins, record
        begins = reader.line_num + 1


def missing_column_hint(config: DataConfig, file: DataFile, columns: list[str]) -> str:
    """What to do where a table lacks a column: another separator, or a header line that is not there."""
    if hint := separator_hint(file, columns):
        return hint
    if file.is_table and not config.columns and columns:
        return "set text, text_pair, label, prompt and cloze to columns of the file; without a header line: `columns`"
    return "set text, text_pair, label, prompt and cloze to columns of the file"
