"""JSON and JSON lines as columns, read in pieces, and which row of them is not what the first one promised."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from mtkd.data.lines import read_lines
from mtkd.data.paths import DataFile
from mtkd.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_AT_ONCE = 20_000
_LIST = 'a list of objects: [{"text": "..."}, ...], or {"data": [...]}'

Placed = tuple[str, Any]
"""A value, and the file and line (or row) it stands at."""


def read_json(file: DataFile, turns: str = "") -> pa.Table:
    """The rows of a .json or .jsonl file; a key that a row lacks is null there.

    Args:
        turns: column of the turns of a chat, which stay the JSON that they are: their objects are not alike.
    Raises:
        DataError: naming the line or row of what is wrong.
    """
    import pyarrow as pa

    rows = (_with_text(_object(place, value), turns) for place, value in _values(file, shown=True))
    pieces: list[pa.Table] = []
    try:
        while piece := list(islice(rows, ROWS_AT_ONCE)):
            names = dict.fromkeys(name for row in piece for name in row)
            pieces.append(pa.table({name: _column([row.get(name) for row in piece]) for name in names}))
        return pa.concat_tables(pieces, promote_options="permissive") if pieces else pa.table({})
    except (pa.ArrowException, OverflowError, ValueError, TypeError) as error:
        _diagnose(file, turns)
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            "the rows make no table", where=file.name, found=f"{type(error).__name__}: {reason[:200]}"
        ) from error


def _column(values: list[Any]) -> pa.Array:
    """The values of a key; TypeError for true and false among numbers, which pyarrow takes for 1 and 0."""
    import pyarrow as pa

    array = pa.array(values)
    if (pa.types.is_floating(array.type) or pa.types.is_integer(array.type)) and bool in set(map(type, values)):
        raise TypeError("true or false among numbers")
    return array


def json_columns(file: DataFile) -> list[str] | None:
    """The keys of the first row of a .jsonl file; None where the beginning of the file does not tell."""
    if file.kind != "jsonl":
        return None
    try:
        first = next(iter(_values(file)), None)
    except DataError:
        return None
    return list(first[1]) if first is not None and isinstance(first[1], dict) else None


def json_lines(file: DataFile) -> Iterator[int]:
    """The line of every row of a .jsonl file."""
    return (number for number, line in enumerate(read_lines(file), start=1) if line.strip())


def _object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError("a row must be a JSON object", where=place, found=value, allowed='{"text": "...", ...}')
    return value


def _with_text(row: dict[str, Any], column: str) -> dict[str, Any]:
    """The row with a column as JSON; half a character is a fault of the column, as elsewhere."""
    value = row.get(column)
    if value is None or isinstance(value, str):
        return row
    return {**row, column: json.dumps(value, ensure_ascii=False)}


def _diagnose(file: DataFile, turns: str) -> None:
    """Raise a DataError for the first row that is not what the rows before it promised; quiet when all are fine."""
    kinds: dict[str, tuple[type, str]] = {}
    for place, value in _values(file):
        for key, item in _object(place, value).items():
            _refuse_odd(key, item, place)
            if item is None or key == turns:
                continue
            kind = float if isinstance(item, int | float) and not isinstance(item, bool) else type(item)
            expected, first = kinds.setdefault(key, (kind, place))
            if kind is not expected:
                raise DataError(
                    f"column '{key}' changes its type", where=place, found=item, allowed=f"the type of {first}"
                )


def _refuse_odd(key: str, item: Any, place: str) -> None:
    if isinstance(item, int) and not -(2**63) <= item < 2**63:
        raise DataError(f"the number of column '{key}' is too large", where=place, found=item, todo="write it as text")
    try:
        json.dumps([key, item], ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(
            f"column '{key}' holds half of a character", where=place, found=ascii(item)[:80], todo="write it as UTF-8"
        ) from None


def _values(file: DataFile, *, shown: bool = False) -> Iterator[Placed]:
    lines = read_lines(file, shown=shown)
    if file.kind == "jsonl":
        yield from _of_lines(lines, file)
        return
    text = "\n".join(lines)
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):  # JSON lines under another name
            yield from _of_lines(text.split("\n"), file)
            return
        raise _malformed(text, file.name, error) from error
    except RecursionError:
        raise DataError("malformed JSON: nested too deeply", where=file.name) from None
    for number, item in enumerate(_rows_of(value, file), start=1):
        yield f"{file.name}, row {number}", item


def _of_lines(lines: Iterable[str], file: DataFile) -> Iterator[Placed]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file.name}, line {number}"
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                raise _malformed(line, place, error) from error
            except RecursionError:
                raise DataError("malformed JSON: nested too deeply", where=place) from None


def _rows_of(value: Any, file: DataFile) -> list[Any]:
    """The rows of a whole file: a list, the list under `data`, or the only list of objects of an object."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError("the file holds no rows", where=file.name, found=type(value).__name__, allowed=_LIST)
    if isinstance(value.get("data"), list):
        return value["data"]
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) == 1:
        rows: list[Any] = value[lists[0]]
        return rows
    raise DataError(
        "the rows stand under `data`" if lists else "a .json file must hold one array of objects",
        where=file.name,
        found=f"an object with the keys {', '.join(map(repr, list(value)[:8]))}",
        allowed=_LIST,
        todo="of pandas: to_json(path, orient='records')" if not lists else "",
    )


def _malformed(text: str, place: str, error: json.JSONDecodeError) -> DataError:
    excerpt = text if len(text) <= 80 else text[max(0, error.pos - 40) : error.pos + 40]
    where = place if "line" in place else f"{place}, line {error.lineno}"
    return DataError(f"malformed JSON: {error.msg}, column {error.colno}", where=where, found=excerpt)
