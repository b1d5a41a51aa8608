"""One file of a cache: the records of contiguous examples as arrays in a safetensors file, read through a memory map.

The header is JSON and the rest are numbers, so nothing in a shard can be executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mtkd.engine.manifest import check_bytes
from mtkd.errors import DataError
from mtkd.models import stored
from mtkd.models.features import split_key
from mtkd.pool.cache.codec import Arrays, SampledCodec, TopCodec
from mtkd.pool.cache.content import PER_EXAMPLE, TEXT_TRAITS, CacheContent
from mtkd.pool.cache.records import Record

_KINDS = {"U8": "u1", "U16": "<u2", "U32": "<u4", "F16": "<f2", "F32": "<f4", "BF16": "<u2"}
_META, _DIGEST = "mtkd", "sha256"
_BLANK = "0" * 64
"""Stands in the place of a shard's digest while that is computed."""


def shard_name(number: int) -> str:
    """ "shard-00007.safetensors"."""
    return f"shard-{number:05d}.safetensors"


def top_codec(content: CacheContent) -> TopCodec:
    return TopCodec(content.columns, content.k, content.bits)


def sampled_codec(content: CacheContent) -> SampledCodec:
    return SampledCodec(content.columns, content.k, content.proposal != 1)


def shard_bytes(content: CacheContent, first: int, records: Sequence[Record]) -> bytes:
    """The file of the records of the examples first, first + 1, ..."""
    arrays: dict[str, Tensor] = {
        "tokens": torch.from_numpy(np.array([r.tokens for r in records], np.uint32)),
        "positions": torch.from_numpy(np.array([r.positions for r in records], np.uint32)),
    }
    facts: dict[str, float] = {"positions": sum(r.positions for r in records)}
    if content.per_token:
        whole = {key: np.concatenate([r.targets[key] for r in records]) for key in _keys(content)}
        coded, measured = _top(content, whole) if content.targets == "top" else _sampled(content, records, whole)
        facts |= measured
        arrays |= {f"target.{key}": torch.from_numpy(value) for key, value in coded.items()}
    for name in content.stored_traits:
        column = np.concatenate([r.traits[name] for r in records]).astype(np.float32)
        arrays[f"trait.{name}"] = torch.from_numpy(column)
    if content.targets == "classes":
        arrays["classes"] = torch.from_numpy(np.stack([_given(r.classes, r) for r in records]).astype(np.float32))
    for key in content.hidden:
        values = [r.hidden[key].to(getattr(torch, content.dtype)) for r in records]
        arrays[f"hidden.{key}"] = torch.stack(values) if _per_example(key) else torch.cat(values)
    # one key: safetensors writes several in an order that changes from process to process
    unsigned = save(arrays, {_META: json.dumps({"first": first, "facts": facts, _DIGEST: _BLANK}, sort_keys=True)})
    return unsigned.replace(_BLANK.encode(), hashlib.sha256(unsigned).hexdigest().encode(), 1)


def is_whole(path: Path) -> bool:
    """Whether a shard is what `shard_bytes` gave: the rest of its bytes have the digest that stands in its header.

    Until a cache is sealed no manifest tells. A shard of an earlier version has no digest, so it is not known to be.
    """
    try:
        digest = str(metadata(read_header(path)[0]).get(_DIGEST)).encode()
        unsigned = path.read_bytes().replace(digest, _BLANK.encode(), 1)
    except (DataError, OSError):
        return False
    return hashlib.sha256(unsigned).hexdigest().encode() == digest


def _keys(content: CacheContent) -> tuple[str, ...]:
    return ("ids", "log_probs", "tail") if content.targets == "top" else ("entropy",)


def _top(content: CacheContent, whole: Arrays) -> tuple[Arrays, dict[str, float]]:
    """(coded arrays, the divergence from what comes back, summed over positions, and the largest error; nats)."""
    codec = top_codec(content)
    coded = codec.encode(whole["ids"], whole["log_probs"], whole["tail"])
    order = np.argsort(whole["ids"], 1)
    exact, tail = np.take_along_axis(whole["log_probs"], order, 1).astype(np.float64), whole["tail"].astype(np.float64)
    _, decoded, coded_tail = codec.decode(coded)
    largest = float(np.abs(exact - decoded)[np.isfinite(exact)].max(initial=0))
    return coded, {"kl": _divergence(exact, decoded) + _divergence(tail, coded_tail), "max_log_prob_error": largest}


def _divergence(exact: np.ndarray, decoded: np.ndarray) -> float:
    """``sum p log(p/q) - p + q`` in nats: KL for masses that sum to 1, and never below 0 where rounding left 1e-8."""
    p, q = np.exp(exact), np.exp(decoded.astype(np.float64))
    return float((p * (np.maximum(exact, -1e30) - decoded) - p + q).sum())


def _sampled(content: CacheContent, records: Sequence[Record], whole: Arrays) -> tuple[Arrays, dict[str, float]]:
    """(coded arrays, the largest error of a log-weight, nats): counts are exact, importances have 11 bits."""
    keys = ("ids", "counts", "importance")
    # records of different batches may have been cut to different numbers of distinct ids
    width = max((r.targets["counts"].shape[1] for r in records), default=0)
    ids, counts, importance = (np.concatenate([_widened(r.targets[key], width) for r in records]) for key in keys)
    coded = sampled_codec(content).encode(ids, counts, importance)
    exact = importance[counts > 0]
    error = np.abs(coded["importance"] - exact).max(initial=0) if "importance" in coded else 0.0
    return coded | {"entropy": whole["entropy"].astype(np.float32)}, {"max_log_weight_error": float(error)}


def _widened(values: np.ndarray, width: int) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, width - values.shape[1])))


def _given(classes: np.ndarray | None, record: Record) -> np.ndarray:
    assert classes is not None, f"example {record.id} has no class logits"
    return classes


def _per_example(key: str) -> bool:
    return split_key(key)[0] in PER_EXAMPLE


def _per_token(name: str) -> bool:
    """Whether an array has a value for every token, and not at targets or per example."""
    kind, _, key = name.partition(".")
    return key in TEXT_TRAITS if kind == "trait" else kind == "hidden" and not _per_example(key)


class Shard:
    """A mapped shard: arrays that are read from the disk where they are sliced.

    Args:
        sealed: its entry in the cache's manifest, with which all of it is compared when it is first mapped.
    Raises:
        DataError: for a file that is not what was sealed, or no shard of this content.
    """

    def __init__(self, path: Path, content: CacheContent, first: int, count: int, sealed: Mapping[str, Any]) -> None:
        self.path, self.content, self.first = path, content, first
        self._map = self._mapped()
        try:
            check_bytes(path, sealed, self._map.data)
        except DataError as error:
            raise self.fail(error.message) from None
        header, start = read_header(path)
        self.arrays = {
            name: self._array(name, entry, start) for name, entry in header.items() if name != "__metadata__"
        }
        self.kinds = {name: str(entry.get("dtype")) for name, entry in header.items()}
        self._check(header, count)
        zero = np.zeros(1, np.int64)
        self.ends = np.concatenate([zero, np.cumsum(self.arrays["positions"], dtype=np.int64)])
        self.token_ends = np.concatenate([zero, np.cumsum(self.arrays["tokens"], dtype=np.int64)])
        self.draw_ends = zero
        if content.targets == "sampled":
            self.draw_ends = np.concatenate([zero, np.cumsum(self.arrays["target.distinct"], dtype=np.int64)])
        self._check_lengths(count)

    def _mapped(self) -> np.ndarray:
        """Every byte of the file, read from the disk where it is looked at."""
        if not self.path.is_file():
            raise self.fail("the shard is missing: its examples cannot be read")
        if not (size := self.path.stat().st_size):
            raise self.fail("not a shard of a cache (safetensors)")
        # torch's maps keep no file descriptor, as Python's do: a process may have many more shards than open files
        mapped = torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8).numpy()
        mapped.flags.writeable = False
        return mapped

    def fail(self, why: str) -> DataError:
        return DataError(why, where=str(self.path), todo="`mtkd cache verify` lists what is broken; make it again")

    def _array(self, name: str, entry: Any, start: int) -> np.ndarray:
        try:
            kind, shape, (begin, end) = np.dtype(_KINDS[entry["dtype"]]), tuple(entry["shape"]), entry["data_offsets"]
            size = kind.itemsize * int(np.prod(shape, dtype=np.int64))
            fits = begin >= 0 and end - begin == size and start + end <= len(self._map) and min(shape, default=1) >= 0
            if not fits:
                raise ValueError
            return np.ndarray(shape, kind, self._map.data, start + begin)
        except (KeyError, TypeError, ValueError):
            raise self.fail(f"the array '{name}' is malformed or cut off") from None

    def _check(self, header: dict[str, Any], count: int) -> None:
        content = self.content
        wanted = {"tokens": "U32", "positions": "U32"}
        if content.targets == "top":
            wanted |= {"target.packed": "U8", "target.range": "F16", "target.tail": "F16"}
            wanted |= {"target.low": "U8"} if top_codec(content).low_bits >= 8 else {}
        if content.targets == "sampled":
            wanted |= {"target.distinct": "U16", "target.draws": "U8", "target.entropy": "F32"}
            wanted |= {"target.importance": "F16"} if content.proposal != 1 else {}
        wanted |= {f"trait.{name}": "F32" for name in content.stored_traits}
        wanted |= {"classes": "F32"} if content.targets == "classes" else {}
        kind = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[content.dtype]
        wanted |= {f"hidden.{key}": kind for key in content.hidden}
        stated = {name: kind for name, kind in self.kinds.items() if name != "__metadata__"}
        if stated != wanted or metadata(header).get("first") != self.first:
            raise self.fail("the shard does not hold what the cache says it does")
        if any(len(self.arrays[name]) != count for name in ("tokens", "positions")):
            raise self.fail(f"the shard does not hold {count} examples")

    def _check_lengths(self, count: int) -> None:
        sizes = {name: self._length(name, count) for name in self.arrays}
        for name, size in sizes.items():
            if len(self.arrays[name]) != size:
                raise self.fail(f"the array '{name}' has another length than its examples")
        if self.content.targets == "top":
            packed = self.arrays["target.packed"].shape[1:]
            codec = top_codec(self.content)
            low = codec.k if codec.low_bits >= 8 else 0
            if packed != (codec.bytes_per_position - low - 4,):
                raise self.fail("the array 'target.packed' has another width than its content")

    def _length(self, name: str, count: int) -> int:
        if name in ("target.draws", "target.importance"):
            return int(self.draw_ends[-1])
        if _per_token(name):
            return int(self.token_ends[-1])
        if name.startswith(("target.", "trait.")):
            return int(self.ends[-1])
        return count

    def part(self, name: str, local: int) -> np.ndarray:
        """The part of an array that belongs to the example `first + local`."""
        if name in ("target.draws", "target.importance"):
            begin, end = self.draw_ends[self.ends[local]], self.draw_ends[self.ends[local + 1]]
        elif _per_token(name):
            begin, end = self.token_ends[local], self.token_ends[local + 1]
        elif name.startswith(("target.", "trait.")):
            begin, end = self.ends[local], self.ends[local + 1]
        else:
            begin, end = local, local + 1
        return self.arrays[name][begin:end]


def metadata(header: dict[str, Any]) -> dict[str, Any]:
    """What a shard says of itself: ``first`` example, ``facts``; {} when it says nothing."""
    try:
        found = json.loads(header["__metadata__"][_META])
    except (KeyError, TypeError, ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {}


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """(the JSON header of a shard, where its numbers begin).

    Raises:
        DataError: for a file of another kind.
    """
    if not path.exists():
        raise DataError("the shard is missing: its examples cannot be read", where=str(path))
    foreign = DataError("not a shard of a cache (safetensors)", where=str(path))
    try:
        header, start = stored.read_header(path)
    except DataError:
        raise foreign from None
    if not all(isinstance(entry, dict) for entry in header.values()):
        raise foreign
    return header, start
