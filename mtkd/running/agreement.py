"""Make all ranks of a run agree on configuration, versions, code, data, precision and the run's folder."""

from __future__ import annotations

import hashlib
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import mtkd
from mtkd.config import RunConfig
from mtkd.config.read import differences, fingerprint
from mtkd.data.progress import say
from mtkd.engine.dist import Dist, on_main
from mtkd.engine.folder import versions
from mtkd.engine.precision import choose, decided, warning
from mtkd.errors import UserError, on_every_rank

_SHOWN = 12  # differing keys in one message
# Seconds until all ranks must see a file of the main rank: network file systems cache listings for a few.
_SEEN_AFTER = 20.0


def agree(dist: Dist, mine: Mapping[str, Any], where: str, todo: str) -> None:
    """Refuse ranks whose values differ; a collective.

    Ranks compare digests first, and send the values only when these differ.

    Args:
        mine: this rank's plain values.
        where, todo: for the message.
    Raises:
        UserError: the same on every rank; it names rank, host, key and both values.
    """
    if dist.world_size == 1:
        return
    digests = _of_all(dist, fingerprint(mine))
    if len(set(digests)) == 1:
        return
    first, *others = _of_all(dist, (dist.rank, socket.gethostname(), dict(mine)))
    lines = []
    for rank, host, values in others:
        changed = differences(first[2], values)
        if changed:
            lines.append(f"rank 0 on {first[1]} -> rank {rank} on {host}:")
            lines += [f"  {line}" for line in changed[:_SHOWN]]
            lines += [f"  and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
    text = "\n           ".join(lines)
    raise on_every_rank(UserError("the ranks of this run do not agree", where=where, found=text, todo=todo))


def agree_on_run(dist: Dist, config: RunConfig, redo: Sequence[str]) -> None:
    """Refuse ranks with other configurations, versions or code, before anything is read; see `agree`."""
    if dist.world_size == 1:
        return
    mine = {
        # only launchers read the hostfile, and its path may differ between nodes
        **config.model_dump(mode="json", exclude={"engine": {"hostfile"}}),
        "--redo": list(redo),
        "versions": {**versions(), "files of mtkd": _code_digest()},
    }
    agree(dist, mine, "configuration", "start every node with the same file, the same options and the same packages")


def agree_on_precision(dist: Dist, config: RunConfig) -> RunConfig:
    """The run with the precision that the main rank chooses and prints; a collective.

    Ranks on other processors follow, and the main rank prints a warning for each host where the precision is slow.
    """
    choice = on_main(dist, lambda: choose(config))
    setting, config = config.engine.precision, decided(config, choice.precision)
    if setting == "auto":
        say(f"precision: {choice}", main=dist.is_main)
    warnings = _of_all(dist, (socket.gethostname(), warning(config.engine)))
    for host, line in {host: line for host, line in reversed(warnings) if line}.items():
        say(line if dist.world_size == 1 else f"on {host}: {line}", main=dist.is_main)
    return config


def new_run_id() -> str:
    """A unique name for a run: its start in UTC by the clock of the main rank, and random digits."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def check_shared(dist: Dist, folder: Path) -> None:
    """Refuse a run folder that is not the same for all ranks; a collective.

    Raises:
        UserError: the same on every rank; it names the nodes that see another folder.
    """
    if dist.world_size == 1:
        return
    mark = dist.broadcast_object(folder / f".tmp-shared-{secrets.token_hex(8)}")  # a name that no other run left here
    on_main(dist, mark.touch)
    limit = time.monotonic() + _SEEN_AFTER
    while not (seen := _listed(mark)) and time.monotonic() < limit:
        time.sleep(0.2)
    blind = sorted({host for host, sees in _of_all(dist, (socket.gethostname(), seen)) if not sees})
    on_main(dist, mark.unlink)
    if blind:
        unshared = UserError(
            "the run's folder is not shared by all nodes: what the main rank writes there is not seen",
            where=str(folder),
            found=f"not seen on {', '.join(blind)}",
            todo="choose an `output` on a file system that every node mounts at the same path",
        )
        raise on_every_rank(unshared)


def _listed(mark: Path) -> bool:
    """Whether a file exists, by its folder's listing: file systems remember a missing name for a while."""
    return mark.parent.is_dir() and mark.name in {path.name for path in mark.parent.iterdir()}


def _of_all(dist: Dist, mine: Any) -> list[Any]:
    """Every rank's value on every rank."""
    return list(dist.broadcast_object(dist.gather_objects(mine)) or ())


@cache
def _code_digest() -> str:
    """Digest of all source files of mtkd: checkouts of one version may differ in code."""
    digest, package = hashlib.sha256(), Path(mtkd.__file__).parent
    for file in sorted(package.rglob("*.py")):
        digest.update(f"{file.relative_to(package)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
