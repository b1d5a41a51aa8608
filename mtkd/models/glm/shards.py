"""Safetensors shards with an index, written one weight at a time: a 20 GB model needs the memory of its largest one.

The format: 8 bytes length (little endian), a JSON header with every weight's type, shape and place, then the bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mtkd.models.folder import INDEX, WEIGHTS
from mtkd.models.glm.names import Stored

SHARD_BYTES = 2 << 30
"""A shard ends before it is larger than this, where that leaves it with one weight or more."""

_CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_ALIGNMENT = 8  # bytes: weights begin at multiples of it, as safetensors' own writer has it


def write_shards(folder: Path, weights: Mapping[str, Stored], shard_bytes: int = SHARD_BYTES) -> int:
    """Write `model.safetensors`, or shards of at most `shard_bytes` and their index; the number of files of weights.

    Every weight is read once, in the order given, and let go before the next one is.
    """
    shards = _shards(weights, shard_bytes)
    single = len(shards) == 1
    places = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        places.update(dict.fromkeys(names, file))
        _write(folder / file, {name: weights[name] for name in names})
    if not single:
        total = sum(num_bytes(weight) for weight in weights.values())
        content = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return len(shards)


def num_bytes(weight: Stored) -> int:
    """Bytes of a weight's values."""
    return torch.Size(weight.shape).numel() * weight.dtype.itemsize


def _shards(weights: Mapping[str, Stored], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = []
    room = 0
    for name, weight in weights.items():
        need = num_bytes(weight)
        if not shards or need > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= need
    return shards


def _write(file: Path, weights: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    place = 0
    for name, weight in weights.items():
        end = place + num_bytes(weight)
        header[name] = {"dtype": _CODES[weight.dtype], "shape": list(weight.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, weight in weights.items():
            value = weight.read()
            assert tuple(value.shape) == weight.shape, name
            assert value.dtype == weight.dtype, name
            values: Any = value.contiguous().reshape(-1).view(torch.uint8).numpy()
            out.write(values)
            del values
            del value
        out.flush()
        os.fsync(out.fileno())
