"""The `files` source: local JSON, JSON lines, CSV, TSV, Parquet, text files and saved data sets, and their broken rows.

    .jsonl   one JSON object per line (also .ndjson); blank lines are ignored
    .json    one JSON array of objects, or an object that holds it, such as {"data": [...]}
    .csv     comma-separated with a header line, quoted as in RFC 4180; every value is text
    .tsv     tab-separated with a header line, a quotation mark is a character like any other; every value is text
    .parquet a table
    .txt     one document per block of lines, blocks being separated by blank lines; its only column is `text`
    a folder that `save_to_disk` of the library datasets wrote, of one split or of several

`separator` of the `data` block makes a .csv or .tsv a quoted table with that separator; with `columns` it has no
header. Leading columns without a name, and "Unnamed: 0", are an index and are ignored. All but Parquet may be
compressed: .gz .bz2 .xz .zst behind the extension.

Every file is UTF-8 (a byte order mark is accepted). Rows are counted from 1 without the header, lines from 1 with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.data.jsonrows import json_columns, json_lines, read_json
from mtkd.data.lines import blocks, read_lines
from mtkd.data.paths import SAVED, DataFile, broken_folder
from mtkd.data.tables import read_table, table_columns, table_rows
from mtkd.errors import DataError, nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset


@dataclass(frozen=True)
class Origin:
    """Where the rows of a dataset were before any was left out, so that an error can name the user's own row.

    Attributes:
        name: the file as the user wrote it, or the source and split; of several files the first and how many more.
        rows: row number in the origin, counted from 0 over all files, [rows of the dataset].
        files: the local files in order, if they are such.
        begins: row number of each file's first row.
    """

    name: str
    rows: np.ndarray
    files: tuple[DataFile, ...] = ()
    begins: tuple[int, ...] = ()

    def where(self, index: int) -> str:
        """Name, row and (of a file with lines) line of a dataset row."""
        row = int(self.rows[index])
        if not self.files:
            return f"{self.name}, row {row + 1}"
        part = int(np.searchsorted(self.begins, row, side="right")) - 1
        file, row = self.files[part], row - self.begins[part]
        line = line_of_row(file, row)
        return f"{file.name}, row {row + 1}" + (f" (line {line})" if line else "")

    def select(self, indices: np.ndarray) -> Origin:
        """The origin of a selection of rows."""
        return Origin(self.name, self.rows[indices], self.files, self.begins)


@dataclass(frozen=True)
class FileRows:
    """The rows of a split, where they come from, and what of its files is not read."""

    rows: Dataset
    origin: Origin
    notes: tuple[str, ...] = ()


def read_files(files: Sequence[DataFile], named: Sequence[str] = (), turns: str = "") -> FileRows:
    """Local files as one dataset in memory, row after row; of several files the columns that all of them have.

    Args:
        named: columns that the configuration names; of several files all have one, or none.
        turns: column of the turns of a chat, which stay JSON.

    Raises:
        DataError: naming the file, the line or row, and what is wrong with it.
    """
    parts: list[Dataset] = []
    notes: list[str] = []
    for file in files:
        rows, note = _read(file, turns)
        parts.append(rows)
        notes += [f"{file.name}: {note}"] if note else []
    name = files[0].name + (f" and {len(files) - 1} more" if len(files) > 1 else "")
    if not sum(map(len, parts)):
        raise DataError("the file has no rows", where=name, found="an empty file", todo="give a file with data")
    notes += [f"{file.name} has no rows" for file, rows in zip(files, parts, strict=True) if not len(rows)]
    begins = np.concatenate([[0], np.cumsum([len(rows) for rows in parts])[:-1]])
    whole, unread = _joined(files, parts, named)
    notes += [f"not in every file, and not read: {', '.join(unread)}"] if unread else []
    origin = Origin(name, np.arange(len(whole)), tuple(files), tuple(int(begin) for begin in begins))
    return FileRows(whole, origin, tuple(notes))


def columns_of(file: DataFile) -> list[str] | None:
    """The column names, where the beginning of the file shows them; None where it does not."""
    if file.kind == "txt":
        return ["text"]
    if file.kind == "parquet":
        import pyarrow.parquet

        try:
            return list(pyarrow.parquet.read_schema(file.path).names)
        except (OSError, ValueError):
            return None
    if file.kind == SAVED:
        return list(_load_saved(file).column_names)  # mapped, not read
    return table_columns(file) if file.is_table else json_columns(file)


def line_of_row(file: DataFile, row: int) -> int:
    """Line (from 1) at which a row (from 0) begins; 0 when the file has no lines to speak of."""
    starts: Iterator[int]
    if file.kind == "jsonl":
        starts = json_lines(file)
    elif file.kind == "txt":
        starts = (number for number, _ in blocks(read_lines(file)))
    elif file.is_table:
        starts = (number for number, _ in table_rows(file))
    else:
        return 0
    return next((line for position, line in enumerate(starts) if position == row), 0)


def require_column(rows: Dataset, column: str, origin: Origin, option: str) -> None:
    """Raise a DataError when a dataset lacks the column that an option names."""
    if column not in rows.column_names:
        todo = nearest_column(column, rows.column_names) or f"set `{option}` to one of its columns"
        raise DataError(f"no column '{column}'", where=origin.name, allowed=rows.column_names, todo=todo)


def values_of(rows: Dataset, column: str) -> list[Any]:
    """Every value of a column; of a selection that is most of a table the whole column is read, ten times as fast.

    `datasets` makes a slice of the table for every selected row: two seconds and more for a million.
    """
    from datasets import ClassLabel, Value

    chosen, plain = rows._indices, isinstance(rows.features[column], Value | ClassLabel)
    if chosen is None or not plain or len(rows) * 2 < len(rows.data):
        every: list[Any] = rows[column][:]
        return every
    values = rows.data.column(column).to_pylist()
    return [values[index] for index in chosen.column(0).to_pylist()]


def nearest_column(column: str, columns: Sequence[str]) -> str:
    """What to do about a column that is not there: the nearest name, or the way to a key of a key; else ""."""
    outer, _, inner = column.partition(".")
    if inner and outer in columns:
        return f"column '{outer}' holds objects: copy their '{inner}' into a column of its own"
    return nearest(column, columns)


def read_texts(rows: Dataset, column: str, origin: Origin, option: str, *, missing: str | None = None) -> list[str]:
    """The texts of a column; raises a DataError naming the file and the first row that holds no text.

    Args:
        missing: what stands for nothing; None: nothing is refused.
    """
    require_column(rows, column, origin, option)
    values = values_of(rows, column)
    if missing is not None:
        values = [missing if value is None else value for value in values]
    for row, value in enumerate(values):
        if not isinstance(value, str):
            shown = "nothing" if value is None else value
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else ""
            raise DataError(
                f"no text in column '{column}'",
                where=origin.where(row),
                found=shown,
                allowed="text",
                todo=f"copy one of its keys ({keys}) into a column of its own" if keys else "",
            )
    return values


def read_domains(rows: Dataset, column: str, origin: Origin) -> list[str]:
    """The domain of each row, "" where it has none; raises a DataError where one is no text."""
    return read_texts(rows, column, origin, "domain", missing="")


def _read(file: DataFile, turns: str) -> tuple[Dataset, str]:
    """The rows of one file, and what of it is ignored."""
    import pyarrow as pa

    if file.kind == SAVED:
        rows = _load_saved(file)
        _check_utf8(rows.data.table, file)
        return rows, ""
    if file.kind == "parquet":
        return _dataset(_read_parquet(file), file), ""
    if file.is_table:
        table, note = read_table(file)
        return _dataset(table, file), note
    if file.kind == "txt":
        texts = [text for _, text in blocks(read_lines(file, shown=True))]
        return _dataset(pa.table({"text": pa.array(texts, pa.string())}), file), ""
    return _dataset(read_json(file, turns), file), ""


def _dataset(table: pa.Table, file: DataFile) -> Dataset:
    from datasets import Dataset

    try:
        # with a name of its own: else every byte is hashed again, and the result would name a cache that is not there
        return Dataset(table, fingerprint="mtkd")
    except (ValueError, TypeError, NotImplementedError) as error:
        raise _unreadable(file, error) from error


def _read_parquet(file: DataFile) -> pa.Table:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(file.path)
    except (OSError, ValueError, NotImplementedError) as error:
        raise _unreadable(file, error) from error
    _check_utf8(table, file)
    return table


def _check_utf8(table: pa.Table, file: DataFile) -> None:
    """Refuse text that is none: other programs write any bytes into a column of text."""
    import pyarrow as pa

    for name, column in zip(table.column_names, table.columns, strict=True):
        if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
            continue
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            for row, value in enumerate(column.cast(pa.large_binary()).to_pylist()):
                try:
                    (value or b"").decode()
                except UnicodeDecodeError as reason:
                    raise DataError(
                        f"column '{name}' is not UTF-8 text: {reason.reason}",
                        where=f"{file.name}, row {row + 1}",
                        found=value[max(0, reason.start - 20) : reason.start + 20],
                        todo="write it as UTF-8",
                    ) from reason
            raise _unreadable(file, error) from error


def _load_saved(file: DataFile) -> Dataset:
    """A split that `save_to_disk` wrote, mapped into memory."""
    from datasets import Dataset

    try:
        return Dataset.load_from_disk(str(file.path)).with_format(None)
    except Exception as error:  # datasets, fsspec, json and pyarrow each have errors of their own
        raise broken_folder(file, error) from error


def _unreadable(file: DataFile, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [""])[0][:200]
    return DataError("the file cannot be read", where=file.name, found=f"{type(error).__name__}: {reason}")


def _joined(files: Sequence[DataFile], parts: Sequence[Dataset], named: Sequence[str]) -> tuple[Dataset, list[str]]:
    """One dataset of the columns that all parts have, and the columns that only some have."""
    from datasets import concatenate_datasets

    if len(parts) == 1:
        return parts[0], []
    filled = [(file, rows) for file, rows in zip(files, parts, strict=True) if len(rows)]
    every = dict.fromkeys(name for _, rows in filled for name in rows.column_names)
    shared = [name for name in every if all(name in rows.column_names for _, rows in filled)]
    for name in every:
        if name in named and name not in shared:
            file, lacking = next((file, rows) for file, rows in filled if name not in rows.column_names)
            todo = nearest_column(name, lacking.column_names) or "the files of a split have the same columns"
            raise DataError(f"no column '{name}'", where=file.name, allowed=lacking.column_names, todo=todo)
    if not shared:
        raise DataError("the files of a split have no column in common", where=filled[-1][0].name, found=list(every))
    types = {name: _type_of(name, filled) for name in shared}
    alike = [_with_types(rows.select_columns(shared), types) for _, rows in filled]
    return concatenate_datasets(alike), [name for name in every if name not in shared]


def _type_of(name: str, filled: Sequence[tuple[DataFile, Dataset]]) -> Any:
    """The feature that holds a column of every file: whole numbers may become others, nothing else changes."""
    import pyarrow as pa
    from datasets import Value
    from datasets.features.features import generate_from_arrow_type

    first, common = filled[0][0], filled[0][1].features[name]
    for file, rows in filled[1:]:
        feature = rows.features[name]
        types = [pa.schema([(name, one.pa_type)]) if isinstance(one, Value) else None for one in (common, feature)]
        try:
            if feature == common:
                continue
            if types[0] is None or types[1] is None:
                raise pa.ArrowTypeError
            common = generate_from_arrow_type(pa.unify_schemas(types, promote_options="permissive").field(0).type)
        except pa.ArrowTypeError:
            raise DataError(
                f"column '{name}' has another type than in {first.name}",
                where=file.name,
                found=str(feature),
                allowed=str(common),
                todo="write the files of a split in the same way",
            ) from None
    return common


def _with_types(rows: Dataset, types: Mapping[str, Any]) -> Dataset:
    from datasets import Features

    features = Features(types)
    return rows if rows.features == features else rows.cast(features)
