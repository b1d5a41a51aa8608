"""The weights of a model folder by name: in which safetensors file each one lies, where in it, and what it is.

Nothing of the values is read here. Who wants them maps the files or reads them piece by piece: a teacher of 20 GB must
not pass through memory whole.

The format: 8 bytes length (little endian), a JSON header with every weight's type, shape and place, then the bytes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from mtkd.errors import DataError
from mtkd.models.folder import INDEX, WEIGHTS, check_links, shard_names

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_HEADER_BYTES = 100_000_000  # longest header that safetensors itself reads
_SHOWN = 5  # names in a message


@dataclass(frozen=True)
class StoredWeight:
    """One weight in a safetensors file.

    Attributes:
        name: in the file.
        file: a checked path.
        dtype, shape: of the values. start, end: bytes from the beginning of the file.
    """

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.start


def read_weights(folder: Path) -> dict[str, StoredWeight]:
    """Every weight of `model.safetensors`, or of the shards that its index names, by the name in the file.

    Args:
        folder: of a model, whose other files were checked (`mtkd.models.folder.check_folder`).

    Raises:
        DataError: no weights; a header that does not describe its file (truncated shards among them); a weight in two
            shards, or in the index only.
    """
    check_links(folder)
    if (folder / WEIGHTS).is_file():
        return _weights_of(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise DataError("the folder has no weights", where=str(folder), allowed=f"{WEIGHTS} or {INDEX} with its shards")
    weights: dict[str, StoredWeight] = {}
    for name in shard_names(index):
        shard = folder / name
        if not shard.is_file():
            raise DataError("a shard is missing", where=str(index), found=name)
        more = _weights_of(shard)
        if twice := sorted(weights.keys() & more.keys()):
            raise DataError("weights stand in two shards", where=str(shard), found=some(twice))
        weights |= more
    if lost := sorted(read_index(index).keys() - weights.keys()):
        raise DataError("the index names weights that no shard has", where=str(index), found=some(lost))
    return weights


def read_index(index: Path) -> dict[str, str]:
    """Name of a weight -> name of its shard.

    Raises:
        DataError: as `shard_names`.
    """
    shard_names(index)
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return weight_map


def read_header(file: Path) -> tuple[dict[str, Any], int]:
    """(the JSON header of a safetensors file, where its numbers begin).

    Raises:
        DataError: a file of another kind, or a truncated one.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_BYTES):
                raise DataError("not a safetensors file, or a truncated one", where=str(file), found=f"{size:,} bytes")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"the header cannot be read: {error}", where=str(file)) from error
    if not isinstance(header, dict):
        raise DataError("the header is not a JSON object", where=str(file))
    return header, 8 + length


def _weights_of(file: Path) -> dict[str, StoredWeight]:
    size, (header, end) = file.stat().st_size, read_header(file)
    header.pop("__metadata__", None)
    weights = {name: _stored(name, entry, file, end) for name, entry in header.items()}
    for weight in sorted(weights.values(), key=lambda w: (w.start, w.end)):
        if weight.start != end:
            raise DataError("weights overlap, or leave a gap", where=f"{file}: {weight.name}")
        end = weight.end
    if end != size:
        raise DataError(
            "the file is truncated" if end > size else "the file is longer than its header says",
            where=str(file),
            found=f"{size:,} bytes",
            allowed=f"{end:,} bytes",
            todo="copy or download it again",
        )
    return weights


def _stored(name: str, entry: Any, file: Path, values: int) -> StoredWeight:
    """One tensor of a file.

    Args:
        values: where the values begin, bytes.
    """
    try:
        code, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, end]
        if not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise ValueError("a size that is not a number")
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"a weight is not described: {error}", where=f"{file}: {name}") from error
    if code not in _DTYPES:
        raise DataError("a type that mtkd does not read", where=f"{file}: {name}", found=code, allowed=sorted(_DTYPES))
    dtype = _DTYPES[code]
    if end - start != prod(shape) * dtype.itemsize:
        raise DataError("its bytes are not those of its shape", where=f"{file}: {name}", found=f"{end - start:,} bytes")
    return StoredWeight(name, file, dtype, tuple(shape), values + start, values + end)


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
