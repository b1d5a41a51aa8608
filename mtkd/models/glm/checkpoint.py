"""Published GLM checkpoints on disk, without running a line of what is in them and without reading them whole.

The four forms: one `mp_rank_00_model_states.pt` of the original training code; the same in several model-parallel
parts; the hub port (`pytorch_model.bin` or safetensors, in one file or in shards); SwissArmyTransformer's
(`mp_rank_00_model_states.pt` again, with the block positions in a mixin).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mtkd.errors import DataError
from mtkd.models.folder import check_links, shard_names
from mtkd.models.glm.names import Stored, stored

_PART = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
_FORMS = "mp_rank_XX_model_states.pt, or pytorch_model.bin, model.safetensors or their index"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        source: file or folder.
        parts: per model-parallel rank the weights by published name.
        hub: whether it is the hub port's, which was meant for the other GELU.
        settings: of config.json or model_config.json next to the weights; {} without one.
    """

    source: Path
    parts: tuple[Mapping[str, Stored], ...]
    hub: bool
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class _File:
    """Weights of one file; `wrapped` as the original's training code does, under the key "module"."""

    weights: dict[str, Stored]
    wrapped: bool


def open_checkpoint(source: Path) -> Checkpoint:
    """Find and open the weights in a file or folder; their values are read later, one by one.

    Raises:
        DataError: no checkpoint, an incomplete one, or a pickle that holds more than weights.
    """
    folder = source if source.is_dir() else source.parent
    if folder.is_dir():
        check_links(folder)
    settings = _settings(folder)
    if source.is_file():
        file = _read(source)
        original = file.wrapped or _PART.fullmatch(source.name) is not None
        return Checkpoint(source, (file.weights,), not original, settings)
    if not source.is_dir():
        raise DataError("no such file or folder", where="SOURCE", found=str(source))
    ranks = {int(match[1]): file for file in folder.iterdir() if (match := _PART.fullmatch(file.name))}
    if ranks:
        if sorted(ranks) != list(range(len(ranks))):
            raise DataError(
                "a model-parallel part is missing",
                where=str(source),
                found=f"parts {sorted(ranks)}",
                allowed=f"0 to {max(ranks)}",
            )
        return Checkpoint(source, tuple(_read(ranks[rank]).weights for rank in sorted(ranks)), False, settings)
    for name in _HUB_FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return Checkpoint(source, (_read(folder / name).weights,), True, settings)
        if index.is_file():
            return Checkpoint(source, (_read_shards(index),), True, settings)
    below = sorted(file.parent.name for file in folder.glob("*/mp_rank_00_model_states.pt"))
    raise DataError(
        "the folder holds no checkpoint",
        where=str(source),
        found=f"folders with one: {', '.join(below)}" if below else sorted(file.name for file in folder.iterdir())[:8],
        allowed=_FORMS,
        todo="name the inner folder" if below else "",
    )


def _settings(folder: Path) -> dict[str, Any]:
    for name in ("config.json", "model_config.json"):
        file = folder / name
        if file.is_file():
            try:
                settings = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                raise DataError(f"cannot be read as JSON: {error}", where=str(file)) from error
            return settings if isinstance(settings, dict) else {}
    return {}


def _read_shards(index: Path) -> dict[str, Stored]:
    weights: dict[str, Stored] = {}
    for name in shard_names(index, (".safetensors", ".bin")):
        shard = index.parent / name
        if not shard.is_file():
            raise DataError("a shard is missing", where=str(index), found=name)
        more = _read(shard).weights
        if twice := sorted(weights.keys() & more.keys()):
            raise DataError("weights stand in two shards", where=str(shard), found=twice[:3])
        weights |= more
    return weights


def _read(file: Path) -> _File:
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> _File:
    def slot(name: str) -> Stored:
        def read() -> Tensor:
            with safe_open(file, framework="pt") as opened:
                return opened.get_tensor(name)

        view = weights.get_slice(name)
        return Stored(tuple(view.get_shape()), _dtype(view.get_dtype(), f"{file}: {name}"), read)

    try:
        with safe_open(file, framework="pt") as weights:
            return _File({name: slot(name) for name in weights.keys()}, False)  # noqa: SIM118  not a mapping
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot be read as safetensors: {error}", where=str(file)) from error


_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


def _dtype(name: str, where: str) -> torch.dtype:
    if name not in _DTYPES:
        raise DataError("weights of this type cannot be converted", where=where, found=name, allowed=sorted(_DTYPES))
    return _DTYPES[name]


def _read_pickle(file: Path) -> _File:
    """A pickle's weights, mapped into memory; classes and functions in it are refused, not looked up."""
    try:
        # what numpy's random state (training checkpoints keep it) is made of: arrays of numbers
        with torch.serialization.safe_globals(_arrays()):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # pickle, zip, OS and torch errors share no base class
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {code[1]}" if code else (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"cannot be read as a file of weights alone: {reason}",
            where=str(file),
            allowed="a zip file of torch.save (torch 1.6 or later) with tensors, numbers and texts",
            todo="where you trust its origin, save its weights alone: torch.save({'module': torch.load(FILE, "
            "weights_only=False)['module']}, NEW)",
        ) from error
    wrapped = isinstance(content, dict) and isinstance(content.get("module"), dict)
    if wrapped:
        content = content["module"]
    if not isinstance(content, dict):
        raise DataError("holds no state dict", where=str(file), found=type(content).__name__)
    strange = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if strange:
        raise DataError(
            "the state dict holds other things than weights",
            where=str(file),
            found=strange[:8],
            allowed="tensors by name, under the key 'module' or directly",
        )
    for name, value in content.items():
        if value.dtype not in _DTYPES.values() or value.layout is not torch.strided:
            raise DataError(
                "weights of this type cannot be converted",
                where=f"{file}: {name}",
                found=f"{value.dtype}, {value.layout}".replace("torch.", ""),
                allowed=", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES.values()) + "; strided",
            )
    return _File({str(name): stored(value) for name, value in content.items()}, wrapped)


def _arrays() -> list[Any]:
    reconstruct: Any = np.zeros(0).__reduce__()[0]  # its module has another name in every numpy
    names = [(reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    kinds = [type(np.dtype(kind)) for kind in ("uint32", "uint8", "int64", "float64")]
    return [*names, np.ndarray, np.dtype, *kinds]
