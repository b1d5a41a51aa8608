"""The weights of a model folder by name: in which safetensors file each one lies, where in it, and what it is.

Nothing of the values is read here. Who wants them maps the files or reads them piece by piece: a teacher of 20 GB must
not pass through memory whole.

The format: 8 bytes length (little endian), a JSON header with every weight's type, shape and place, then the bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from mtkd.errors import DataError
from mtkd.models.folder import INDEX, WEIGHTS, check_links, shard_names
from mtkd.models.load import empty_model, of_another_head

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
_COMPARED_BYTES = 1 << 24  # of two copies of a weight at a time
_SHOWN = 5  # names in a message

# What older checkpoints hold besides weights: tables that the modules compute themselves.
_COMPUTED = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")


@dataclass(frozen=True)
class StoredWeight:
    """One weight in a safetensors file.

    Attributes:
        name: in the file. file: a checked path.
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
        return _read_header(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        raise DataError("the folder has no weights", where=str(folder), allowed=f"{WEIGHTS} or {INDEX} with its shards")
    found: dict[str, StoredWeight] = {}
    for name in shard_names(index):
        shard = folder / name
        if not shard.is_file():
            raise DataError("a shard is missing", where=str(index), found=name)
        more = _read_header(shard)
        if twice := sorted(found.keys() & more.keys()):
            raise DataError("weights stand in two shards", where=str(shard), found=_some(twice))
        found |= more
    promised = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if lost := sorted(promised.keys() - found.keys()):
        raise DataError("the index names weights that no shard has", where=str(index), found=_some(lost))
    return found


def _read_header(file: Path) -> dict[str, StoredWeight]:
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
    header.pop("__metadata__", None)
    found = {name: _stored(name, entry, file, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for weight in sorted(found.values(), key=lambda w: (w.start, w.end)):
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
    return found


def _stored(name: str, entry: Any, file: Path, values: int) -> StoredWeight:
    """Args: values: where the values begin, bytes."""
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


def find_weights(model: PreTrainedModel, folder: Path) -> dict[str, StoredWeight]:
    """Which stored weight each parameter and persistent buffer of a model is; the model may be on the meta device.

    Names may lack the prefix of the bare encoder or decoder. Of tied parameters one is enough; where there are more,
    they must hold the same values.

    Returns:
        Name in `model.state_dict()` -> weight; of tied parameters every name.

    Raises:
        DataError: naming the weights that are missing, of another shape, not part of the architecture, or not floats.
    """
    stored = read_weights(folder)
    values = dict(model.state_dict(keep_vars=True))
    ours = _by_our_name(stored, values, model.base_model_prefix, folder)
    found: dict[str, StoredWeight] = {}
    missing, misshapen = [], []
    for names in _tied(values):
        there = [ours[name] for name in names if name in ours]
        if not there:
            missing.append(names[0])
            continue
        misshapen += [
            f"{w.name} {list(w.shape)} instead of {list(values[names[0]].shape)}"
            for w in there
            if w.shape != tuple(values[names[0]].shape)
        ]
        found |= dict.fromkeys(names, there[0])
        for other in there[1:]:
            if not misshapen and not _same_values(there[0], other):
                raise DataError(
                    "two weights are one in the configuration and differ in the checkpoint",
                    where=str(folder),
                    found=f"{there[0].name}, {other.name}",
                    todo="set tie_word_embeddings in its config.json to what it is",
                )
    strange = [
        f"{w.name} {w.dtype}"
        for name, w in found.items()
        if values[name].is_floating_point() != w.dtype.is_floating_point
    ]
    used, ignored = {weight.name for weight in ours.values()}, _ignored(model)
    unexpected = [name for name in stored if name not in used and not ignored(name)]
    _refuse(
        folder,
        {
            "missing": missing,
            "of another shape": misshapen,
            "not part of the architecture": unexpected,
            "of another type": strange,
        },
    )
    return found


def check_weights(config: PretrainedConfig, auto_class: str, folder: Path) -> None:
    """Refuse, before anything is read of them, weights that are not those of a configuration; see `find_weights`.

    Raises:
        DataError: as `find_weights`.
    """
    find_weights(empty_model(config, auto_class), folder)


def _by_our_name(
    stored: Mapping[str, StoredWeight], ours: Mapping[str, Tensor], prefix: str, folder: Path
) -> dict[str, StoredWeight]:
    found: dict[str, StoredWeight] = {}
    for name, weight in stored.items():
        new = next((n for n in (name, f"{prefix}.{name}") if n in ours), None)
        if new in found:
            raise DataError("a weight is there twice", where=str(folder), found=f"{found[new].name}, {name}")
        if new is not None:
            found[new] = weight
    return found


def _tied(values: Mapping[str, Tensor]) -> list[list[str]]:
    """Names that belong to one parameter or buffer, together."""
    groups: dict[int, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(id(value), []).append(name)
    return list(groups.values())


def _ignored(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a stored weight need not be in the model: another task's head, or a table that modules compute."""
    patterns = [*_COMPUTED, *(model._keys_to_ignore_on_load_unexpected or ())]
    computed = re.compile("|".join(f"({pattern})" for pattern in patterns))
    prefix = model.base_model_prefix
    return lambda name: computed.search(name) is not None or of_another_head(name, prefix)


def _same_values(one: StoredWeight, other: StoredWeight) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as left, other.file.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        for start in range(0, one.num_bytes, _COMPARED_BYTES):
            size = min(_COMPARED_BYTES, one.num_bytes - start)
            if left.read(size) != right.read(size):
                return False
    return True


def _refuse(folder: Path, wrong: Mapping[str, list[str]]) -> None:
    told = [f"{len(names)} {what}: {_some(sorted(names))}" for what, names in wrong.items() if names]
    if told:
        raise DataError(
            "the checkpoint does not fit its configuration",
            where=str(folder),
            found="; ".join(told),
            todo="use the complete checkpoint of a model made for this task, saved by a current transformers "
            "(from_pretrained, then save_pretrained, renames the weights of older ones)",
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
