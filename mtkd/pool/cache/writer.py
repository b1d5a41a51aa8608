"""Writes a cache shard by shard: a kill at any moment loses at most the shards that were being written.

A shard holds contiguous examples and exists whole or not at all, so ranks take disjoint ones, a later run goes on with
those that are missing, and at another world size too. The manifest, written last, makes a folder of shards a cache.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtkd.engine.record import read_object
from mtkd.engine.seal import fault_point, seal, write_atomic
from mtkd.errors import DataError, UserError
from mtkd.pool.cache.content import FORMAT, CacheContent, CacheOrigin
from mtkd.pool.cache.records import Record
from mtkd.pool.cache.shard import is_whole, metadata, read_header, shard_bytes, shard_name

PLAN = "cache.json"


class CacheWriter:
    """Writes the shards of one cache.

    Args:
        folder: of the cache; made when it is not there.
        content, origin: what is stored, and of what. A folder that was begun with others is refused.
        shard_examples: examples per shard: what a kill can lose per rank. A few thousand tokens and up keep the
            headers below a thousandth.
    Raises:
        DataError: for a folder begun with another content, origin or shard size.
    """

    def __init__(self, folder: Path, content: CacheContent, origin: CacheOrigin, shard_examples: int = 256) -> None:
        content.check(str(folder))
        if shard_examples < 1:
            raise UserError("a shard holds at least one example", where=str(folder), found=shard_examples)
        self.folder, self.content, self.origin, self.shard_examples = folder, content, origin, shard_examples
        folder.mkdir(parents=True, exist_ok=True)
        plan = {
            "format": FORMAT,
            "content": content.as_json(),
            "origin": origin.as_json(),
            "shard_examples": shard_examples,
        }
        text = json.dumps(plan, indent=1, sort_keys=True) + "\n"
        path = folder / PLAN
        if not path.exists():
            write_atomic(path, text)
        elif path.is_dir() or path.read_bytes() != text.encode():
            raise DataError(
                "the folder holds a cache of something else",
                where=str(path),
                found=_difference(path, plan),
                todo="remove the folder to make the cache again, or write to another one",
            )

    @property
    def num_shards(self) -> int:
        return -(-self.origin.num_examples // self.shard_examples)

    def examples(self, number: int) -> range:
        """Numbers of the examples of a shard."""
        first = number * self.shard_examples
        return range(first, min(first + self.shard_examples, self.origin.num_examples))

    def missing(self) -> list[tuple[int, range]]:
        """The shards that are not there, or not whole: (number, its examples). Reads all that are there."""
        return [
            (number, self.examples(number))
            for number in range(self.num_shards)
            if not is_whole(self.folder / shard_name(number))
        ]

    def write(self, number: int, records: Sequence[Record]) -> None:
        """Write one shard: its examples, each once, in any order. The file appears whole."""
        ordered = sorted(records, key=lambda record: record.id)
        wanted = self.examples(number)
        assert [record.id for record in ordered] == list(wanted), f"shard {number} holds the examples {wanted}"
        data, path = shard_bytes(self.content, wanted.start, ordered), self.folder / shard_name(number)
        fault_point("before-cache-shard", number)
        write_atomic(path, data)
        fault_point("after-cache-shard", number)

    def finish(self) -> dict[str, Any]:
        """Measure, digest every file and write the manifest; for one process, when every shard is there.

        Returns:
            The facts: ``positions``, ``bytes``, ``bytes_per_position`` (whole files, all that is stored), and for
            ``top`` ``kl`` (of what comes back from the teacher's k + 1 outcomes, mean over positions) and
            ``max_log_prob_error``, for ``sampled`` ``max_log_weight_error``; nats.
        Raises:
            UserError: when a shard is missing.
        """
        missing = self.missing()
        if missing:
            names = ", ".join(shard_name(number) for number, _ in missing[:3])
            raise UserError(
                f"{len(missing)} shards are not yet written, or not whole",
                where=str(self.folder),
                found=names,
                todo="run it again: these shards are made again, and no others",
            )
        for left in self.folder.glob(".tmp-*"):
            left.unlink()  # of a writer that was killed
        facts = self._facts()
        fault_point("before-manifest", 0)
        manifest = {
            "content": self.content.as_json(),
            "origin": self.origin.as_json(),
            "shard_examples": self.shard_examples,
            "cache_format": FORMAT,
            "facts": facts,
        }
        seal(self.folder, manifest)
        return facts

    def _facts(self) -> dict[str, Any]:
        paths = [self.folder / shard_name(number) for number in range(self.num_shards)]
        parts = [metadata(read_header(path)[0])["facts"] for path in paths]
        positions = sum(part["positions"] for part in parts)
        size = sum(path.stat().st_size for path in paths)
        facts: dict[str, Any] = {"positions": positions, "bytes": size}
        facts["bytes_per_position"] = size / max(positions, 1)
        if self.content.targets == "top":
            facts["kl"] = sum(part["kl"] for part in parts) / max(positions, 1)
            facts["max_log_prob_error"] = max((part["max_log_prob_error"] for part in parts), default=0.0)
        if self.content.targets == "sampled":
            facts["max_log_weight_error"] = max((part["max_log_weight_error"] for part in parts), default=0.0)
        return facts


def _difference(path: Path, plan: dict[str, Any]) -> str:
    """The fields of a begun cache that differ from the plan, with both values."""
    try:
        begun = read_object(path)
        pairs = [
            (f"{part}.{name}", begun[part].get(name), value)
            for part in ("content", "origin")
            for name, value in json.loads(json.dumps(plan[part])).items()
        ]
        pairs.append(("shard_examples", begun["shard_examples"], plan["shard_examples"]))
        pairs.append(("format", begun["format"], plan["format"]))
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return "a file that is no plan of a cache"
    return "; ".join(f"{name} {found!r} instead of {asked!r}" for name, found, asked in pairs if found != asked)
