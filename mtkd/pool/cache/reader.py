"""Reads a cache by example number, in any order, and checks one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtkd.engine.manifest import MANIFEST, broken_files, check_seal, verify_file
from mtkd.engine.record import read_object
from mtkd.errors import DataError
from mtkd.models.features import SparseRows, split_key
from mtkd.pool.cache.codec import Arrays
from mtkd.pool.cache.content import FORMAT, PER_EXAMPLE, CacheContent, CacheOrigin
from mtkd.pool.cache.records import Records
from mtkd.pool.cache.shard import Shard, sampled_codec, shard_name, top_codec
from mtkd.pool.cache.writer import PLAN

_MAPPED = 2048
"""Shards of one cache that are mapped at a time: about 30 kB each, and a process may have 65,530 maps."""


class CacheReader:
    """A finished cache. Shards are mapped when they are read; memory stays with the operating system's cache.

    The shards that were read last stay mapped. One that is let go is unmapped when nothing refers to its arrays.

    Args:
        folder: with a manifest; names and sizes of its files are checked here, a shard's digest when it is first
            mapped.
    Raises:
        DataError: for a folder that is no finished cache, or whose files are not those that were sealed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = check_seal(folder, digests=False, shared=True)  # nothing in it can be executed
        where = str(folder / MANIFEST)
        if manifest.get("cache_format") != FORMAT:
            raise DataError(
                "not a cache that this version reads", where=where, found=manifest.get("cache_format"), allowed=FORMAT
            )
        self.content = CacheContent.from_json(manifest.get("content"), where)
        self.origin = CacheOrigin.from_json(manifest.get("origin"), where)
        self.content.check(where)
        size, facts = manifest.get("shard_examples"), manifest.get("facts")
        if not isinstance(size, int) or size < 1 or not isinstance(facts, dict):
            raise DataError("the manifest is malformed", where=where)
        self.shard_examples: int = size
        self.facts: dict[str, Any] = facts
        expected = {PLAN, *(shard_name(number) for number in range(self.num_shards))}
        if missing := sorted(expected - manifest["files"].keys()):
            raise DataError("a shard is not in the manifest", where=where, found=missing[0])
        self._files: dict[str, dict[str, Any]] = manifest["files"]
        self._check_plan(manifest)
        self._shards: OrderedDict[int, Shard] = OrderedDict()  # the last one was read last

    def _check_plan(self, manifest: Mapping[str, Any]) -> None:
        """Compare the manifest with the plan, which has a digest in it: older manifests have none of themselves."""
        verify_file(self.folder, PLAN, manifest)
        plan = read_object(self.folder / PLAN)
        if any(plan.get(name) != manifest[name] for name in ("content", "origin", "shard_examples")):
            raise DataError("the manifest is not that of this cache", where=str(self.folder / MANIFEST))

    @property
    def num_shards(self) -> int:
        return -(-self.origin.num_examples // self.shard_examples)

    def check(self, origin: CacheOrigin, where: str) -> None:
        """Refuse a cache of another teacher, tokenizer, data set or precision: DataError with both values."""
        self.origin.check(origin, where)

    def shard(self, number: int) -> Shard:
        """A mapped shard, of examples ``number * shard_examples`` and on."""
        if number not in self._shards:
            first, name = number * self.shard_examples, shard_name(number)
            count = min(self.shard_examples, self.origin.num_examples - first)
            self._shards[number] = Shard(self.folder / name, self.content, first, count, self._files[name])
            if len(self._shards) > _MAPPED:
                self._shards.popitem(last=False)
        self._shards.move_to_end(number)
        return self._shards[number]

    def read(self, ids: Sequence[int]) -> Records:
        """The records of examples, in this order; -1 stands for a filler row.

        Raises:
            DataError: for an example that the cache does not have, or a broken shard.
        """
        places: list[tuple[Shard, int] | None] = []
        for example in ids:
            if not -1 <= example < self.origin.num_examples:
                raise DataError(
                    f"the cache has no example {example}",
                    where=str(self.folder),
                    allowed=f"0 to {self.origin.num_examples - 1}",
                )
            number, local = divmod(example, self.shard_examples)
            places.append(None if example < 0 else (self.shard(number), local))
        values, traits = self._positions([pair for pair in places if pair])
        return Records(
            self.content,
            tuple(ids),
            tokens=torch.tensor([int(p[0].part("tokens", p[1])[0]) if p else 0 for p in places]),
            positions=torch.tensor([int(p[0].part("positions", p[1])[0]) if p else 0 for p in places]),
            values=values,
            traits=traits,
            classes=self._rows("classes", places) if self.content.targets == "classes" else None,
            hidden={key: self._hidden(key, places) for key in self.content.hidden},
            where=str(self.folder),
        )

    def _positions(self, places: list[tuple[Shard, int]]) -> tuple[SparseRows | None, dict[str, Tensor]]:
        traits = {name: _tensor(_parts(f"trait.{name}", places)) for name in self.content.stored_traits}
        if not self.content.per_token:
            return None, traits
        if not places:
            empty, none = torch.zeros(0, self.content.k), torch.zeros(0)
            tail = none if self.content.targets == "top" else None
            return SparseRows(empty.long(), empty, tail, self.content.temperature, None), traits
        names = [name for name in places[0][0].arrays if name.startswith("target.")]
        coded = {name.removeprefix("target."): _parts(name, places) for name in names}
        try:
            values = self._decoded(coded)
        except ValueError as error:
            raise places[0][0].fail(f"the targets of {len(places)} examples are broken: {error}") from None
        return values, traits

    def _decoded(self, coded: Arrays) -> SparseRows:
        temperature = self.content.temperature
        if self.content.targets == "top":
            ids, log_probs, tail = top_codec(self.content).decode(coded)
            return SparseRows(torch.from_numpy(ids), torch.from_numpy(log_probs), torch.from_numpy(tail), temperature)
        ids, log_probs = sampled_codec(self.content).decode(coded)
        entropy = torch.from_numpy(coded["entropy"])
        return SparseRows(torch.from_numpy(ids), torch.from_numpy(log_probs), None, temperature, entropy)

    def _rows(self, name: str, places: list[tuple[Shard, int] | None]) -> Tensor:
        """One row per example, zeros in filler rows."""
        return _placed(torch.from_numpy(self._stored(name, places)), places)

    def _stored(self, name: str, places: list[tuple[Shard, int] | None]) -> np.ndarray:
        """An array of the examples that are no filler rows, one after another."""
        empty = self.shard(0).arrays[name][:0]
        return np.concatenate([empty, *(shard.part(name, local) for shard, local in filter(None, places))])

    def _hidden(self, key: str, places: list[tuple[Shard, int] | None]) -> Tensor:
        tensor = torch.from_numpy(self._stored(f"hidden.{key}", places))
        tensor = tensor.view(torch.bfloat16) if self.content.dtype == "bfloat16" else tensor
        return _placed(tensor, places) if split_key(key)[0] in PER_EXAMPLE else tensor


def _placed(stored: Tensor, places: list[tuple[Shard, int] | None]) -> Tensor:
    """One row per example that was asked for, zeros in filler rows."""
    whole = torch.zeros(len(places), *stored.shape[1:], dtype=stored.dtype)
    whole[torch.tensor([pair is not None for pair in places], dtype=torch.bool)] = stored
    return whole


def _parts(name: str, places: Sequence[tuple[Shard, int]]) -> np.ndarray:
    """An array of several examples, one after another, copied out of the map."""
    if not places:
        return np.zeros(0, np.float32)
    return np.concatenate([shard.part(name, local) for shard, local in places])


def _tensor(values: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, np.float32))


@dataclass(frozen=True)
class VerifyResult:
    """What `verify` saw: the facts of the manifest (empty when there is none), and every problem with its file."""

    facts: dict[str, Any]
    problems: list[str]

    @property
    def fine(self) -> bool:
        return not self.problems


def verify(folder: Path) -> VerifyResult:
    """Every digest, every shard's structure and every position's bytes; all problems, not only the first."""
    try:
        reader = CacheReader(folder)
    except DataError as error:
        return VerifyResult({}, [_told(error), *broken_files(folder)])
    problems = broken_files(folder)
    for number in range(reader.num_shards):
        first = number * reader.shard_examples
        try:
            for example in range(first, min(first + reader.shard_examples, reader.origin.num_examples)):
                reader.read([example])
        except DataError as error:
            problems.append(_told(error))
    return VerifyResult(reader.facts, list(dict.fromkeys(problems)))


def _told(error: DataError) -> str:
    return f"{error.where}: {error.message}"
