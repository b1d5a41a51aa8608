"""Data sets of the Hugging Face hub through `datasets`: whole, or so many rows of a stream, which are kept on disk.

What a stream gave is kept in the cache of `datasets`, below the commit that it came from: to plan, to run and to resume
read the same rows, and only the first of them asks the hub.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtkd.data.files import Origin
from mtkd.data.paths import KINDS, SPLITS, Split
from mtkd.data.progress import Working, say
from mtkd.data.raw import Raw
from mtkd.errors import DataError, UserError, nearest

if TYPE_CHECKING:
    from datasets import Dataset

    from mtkd.config import DataConfig

_COMMIT = re.compile(r"[0-9a-f]{40}")
_AT_ONCE = 1_000
"""Rows."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_CLIENTS = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "aiohttp", "socket")
_ROWS, _FACTS = "rows.parquet", "stream.json"


class NotReached(DataError):
    """A data set that is neither on this machine nor on a hub that answers; its id may be right."""


def hub_rows(config: DataConfig, base: Path, columns: tuple[str, ...]) -> Raw:
    """The rows of a data set.

    Args:
        base: folder of the YAML file.
        columns: that are read; a stream keeps no others.
    Raises:
        DataError: it cannot be loaded, has no such split or column. NotReached: the hub does not answer.
    """
    return _streamed(config, base, columns) if config.stream else _whole(config)


def _whole(config: DataConfig) -> Raw:
    import datasets

    assert config.path is not None
    try:
        dataset = datasets.load_dataset(config.path, config.subset, revision=config.revision)
    except Exception as error:  # every kind of network, cache and format error ends here
        raise _refused(config, error) from error
    mapping = _mapped(config, dataset)
    splits = {split: dataset[mapping[split]] for split in SPLITS if split in mapping}
    if not splits:
        raise DataError("none of its splits is mapped", where="@data.splits", found="nothing", allowed=sorted(dataset))
    prints = [f"{s}:{mapping[s]}:{rows._fingerprint}" for s, rows in splits.items()]
    digest = hashlib.sha256("\0".join([config.path, config.subset or "", config.revision or "", *prints]).encode())
    return _raw(config, splits, mapping, digest.hexdigest())


def _mapped(config: DataConfig, dataset: Mapping[str, Any]) -> dict[Split, str]:
    """The published split of each of ours."""
    mapping: dict[Split, str] = dict(config.splits) or {s: s for s in SPLITS if s in dataset}
    for split, published in mapping.items():
        if published not in dataset:
            raise DataError("no such split", where=f"@data.splits.{split}", found=published, allowed=sorted(dataset))
    return mapping


def _raw(
    config: DataConfig,
    splits: Mapping[Split, Dataset],
    mapping: Mapping[Split, str],
    digest: str,
    notes: tuple[str, ...] = (),
) -> Raw:
    name = " ".join(part for part in (config.path, config.subset) if part)
    description = f"{name}: " + ", ".join(f"{s} {len(rows)} rows" for s, rows in splits.items())
    origins: dict[str, Origin] = {s: Origin(f"{name} {mapping[s]}", np.arange(len(r))) for s, r in splits.items()}
    return Raw(dict(splits.items()), digest, description, origins, notes=notes)


def commit_of(config: DataConfig, base: Path) -> str | None:
    """The commit that a stream's revision names now; None for a folder, and where there is nothing to ask.

    A hub that does not answer is not asked again: the commit of the last time is taken.

    Raises:
        DataError: no such data set or revision, or it is gated.
    """
    from huggingface_hub import HfApi

    assert config.path is not None
    if _folder(config, base) is not None or _COMMIT.fullmatch(config.revision or ""):
        return None
    last = _store() / "commits" / _key([config.path, config.revision or ""])
    try:
        commit = HfApi().dataset_info(config.path, revision=config.revision, timeout=30).sha
    except Exception as error:
        refused = _refused(config, error)
        if not isinstance(refused, NotReached):
            raise refused from error
        return last.read_text().strip() if last.is_file() else None
    if commit:
        last.parent.mkdir(parents=True, exist_ok=True)
        _write_whole(last, commit)
    return commit


@dataclass(frozen=True)
class _Stream:
    """Rows of a published split: which, and where they are kept."""

    config: DataConfig
    source: str
    published: str
    most: int
    columns: tuple[str, ...]
    state: str
    """The commit, or of a folder the names, sizes and times of its files."""

    @property
    def folder(self) -> Path:
        """Where its rows are kept."""
        config = self.config
        what = [self.source, config.subset, self.state, self.published, self.most, config.stream_buffer, config.seed]
        return _store() / _key([*what, *sorted(self.columns)])


def _streamed(config: DataConfig, base: Path, columns: tuple[str, ...]) -> Raw:
    folder = _folder(config, base)
    source = str(folder or config.path)
    state = _listing(folder) if folder is not None else commit_of(config, base) or config.revision or ""
    published = {split: config.splits.get(split, split) for split in config.stream}
    splits, notes, prints = {}, [], []
    for split in (s for s in SPLITS if s in config.stream):
        most = config.stream[split]
        stream = _Stream(config, source, published[split], most, columns, state)
        kept = _kept(stream)
        if kept is None:
            _keep(stream, split)
            kept = _kept(stream)
        if kept is None:
            raise DataError("what was written cannot be read", where=str(stream.folder), todo="look after this disk")
        splits[split], content = kept
        prints.append(f"{split}:{published[split]}:{content}")
        notes.append(_said(stream, split, len(splits[split])))
    digest = hashlib.sha256("\0".join([config.path or "", config.subset or "", "stream", *prints]).encode())
    return _raw(config, splits, published, digest.hexdigest(), tuple(notes))


def _kept(stream: _Stream) -> tuple[Dataset, str] | None:
    """The rows that are on the disk and their sha256; None where there are none, or they are damaged and now gone."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    place = stream.folder
    if not place.exists():
        return None
    try:
        facts = json.loads((place / _FACTS).read_text())
        if _digest(place / _ROWS) != facts["file"]:
            raise ValueError("other bytes than were written")
        return datasets.Dataset(pq.read_table(place / _ROWS, memory_map=True), fingerprint="mtkd"), facts["sha256"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        say(f"{place}: {error}: rows of {stream.config.path} are streamed again")
        shutil.rmtree(place, ignore_errors=True)
        return None


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _said(stream: _Stream, split: str, rows: int) -> str:
    """Which rows a split has, in words."""
    at = f" at {stream.state[:12]}" if _COMMIT.fullmatch(stream.state) else ""
    buffer = stream.config.stream_buffer
    order = f"shuffled with a buffer of {buffer:,}" if buffer else "in their order"
    many = f"the {rows:,} rows that it has" if rows < stream.most else f"{rows:,} rows"
    return f"{split}: {many} of {stream.config.path} {stream.published}{at}, {order}"


def _keep(stream: _Stream, split: str) -> None:
    """Read the stream and keep its rows, whole or not at all."""
    place = stream.folder
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    except OSError as error:
        raise _not_kept(place.parent, error) from error
    try:
        count, digest = _write(aside / _ROWS, stream, split)
        facts = {"path": stream.config.path, "split": stream.published, "of": stream.state, "rows": count}
        facts["file"] = _digest(aside / _ROWS)
        _write_whole(aside / _FACTS, json.dumps({**facts, "sha256": digest}))
        try:
            aside.rename(place)
        except OSError:  # another process was first, with the same rows
            if not (place / _FACTS).is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write(file: Path, stream: _Stream, split: str) -> tuple[int, str]:
    """Rows and their sha256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    digest, count, writer = hashlib.sha256(), 0, None
    try:
        with Working(f"streaming {stream.config.path} ({split})", stream.most) as working:
            for batch, schema in _batches(stream, split):
                table = pa.Table.from_pydict(batch, schema=schema)
                digest.update(json.dumps(batch, sort_keys=True, default=str, ensure_ascii=False).encode())
                writer = writer or pq.ParquetWriter(file, table.schema)
                writer.write_table(table.cast(writer.schema))
                count += len(table)
                working.at(count)
    except UserError:
        raise
    except Exception as error:  # of the network, of a file that is not what its name says, of values of other types
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _not_kept(file.parent.parent, error) from error
        if "StopIteration" in str(error):  # what `datasets` says of a split whose files are empty
            raise _empty(stream) from error
        raise _refused(stream.config, error, folder=stream.source != stream.config.path) from error
    finally:
        if writer is not None:
            writer.close()
    if not count:
        raise _empty(stream)
    return count, digest.hexdigest()


def _empty(stream: _Stream) -> DataError:
    return DataError("the split has no rows", where=f"{stream.config.path} {stream.published}", found="0 rows")


def _not_kept(folder: Path, error: OSError) -> DataError:
    todo = "free some space, take fewer rows, or set HF_DATASETS_CACHE to another folder"
    return DataError("the rows of the stream cannot be kept", where=str(folder), found=str(error), todo=todo)


def _batches(stream: _Stream, split: str) -> Iterator[tuple[dict[str, list[Any]], Any]]:
    """Columns of some rows at a time, with their types where these are known before."""
    import datasets

    config = stream.config
    revision = stream.state if _COMMIT.fullmatch(stream.state) else config.revision
    every = datasets.load_dataset(stream.source, config.subset, revision=revision, streaming=True)
    if stream.published not in every:
        where = f"@data.splits.{split}" if split in config.splits else f"@data.stream.{split}"
        todo = f"name it: splits: {{{split}: ...}}; {nearest(stream.published, list(every))}".removesuffix("; ")
        raise DataError("no such split", where=where, found=stream.published, allowed=sorted(every), todo=todo)
    rows = every[stream.published]
    there = list(rows.features or next(iter(rows), {}))
    wanted = [column for column in there if column in stream.columns]
    if lacking := [column for column in stream.columns if column not in there]:
        required = [column for column in lacking if column not in (config.teacher, config.label)]
        if required:
            raise DataError(
                "no such column",
                where=f"{config.path} {stream.published}",
                found=required[0],
                allowed=there,
                todo=nearest(required[0], there),
            )
    rows = rows.select_columns(wanted)
    if config.stream_buffer:
        rows = rows.shuffle(seed=config.seed, buffer_size=config.stream_buffer)
    for batch in rows.take(stream.most).iter(_AT_ONCE):
        yield batch, rows.features.arrow_schema if rows.features else None


def _refused(config: DataConfig, error: Exception, *, folder: bool = False) -> DataError:
    """Why a data set cannot be loaded, and what helps.

    Args:
        folder: whether it is one of this machine.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    every = [error, *filter(None, (error.__cause__, error.__context__))]
    reason = " ".join(str(error).split())[:300]
    where, found = "@data.path", str(config.path)
    if any(isinstance(e, GatedRepoError) for e in every) or "gated" in reason:
        address = f"https://huggingface.co/datasets/{config.path}"
        todo = f"accept its terms at {address}, and log in with `hf auth login` or HF_TOKEN"
        return DataError("the data set is gated", where=where, found=found, todo=todo)
    if any(isinstance(e, RevisionNotFoundError) for e in every):
        todo = "name a branch, a tag or a commit of the data set"
        return DataError("no such revision", where="@data.revision", found=str(config.revision), todo=todo)
    if any(isinstance(e, RepositoryNotFoundError) for e in every) or type(error).__name__ == "DatasetNotFoundError":
        todo = "check the id; a private one needs `hf auth login` or HF_TOKEN"
        return DataError("there is no such data set on the hub", where=where, found=found, todo=todo)
    if "BuilderConfig" in reason or "Config name is missing" in reason:
        names = re.search(r"\[(.*?)\]", str(error), re.DOTALL)
        allowed = names[1] if names else reason
        return DataError("no such subset", where="@data.subset", found=str(config.subset), allowed=allowed)
    if "HFValidationError" in type(error).__name__:
        allowed = "an id, such as nyu-mll/glue, or a folder that is there"
        return DataError("neither a folder nor the id of a data set", where=where, found=found, allowed=allowed)
    todo = "check the id, subset and revision, and the connection (or HF_HOME and HF_HUB_OFFLINE=1 when cached)"
    if folder:
        todo = "correct its files, which `datasets` reads by their names and README.md"
    if "save_to_disk" in reason or Path(config.path or "").suffix.lower() in KINDS:
        todo = "read files, and a folder of save_to_disk, with source: files"
    away = isinstance(error, ConnectionError | TimeoutError) or any(_of_network(e) for e in every)
    return (NotReached if away else DataError)(
        f"the data set cannot be loaded: {type(error).__name__}: {reason}",
        where=where,
        found=found,
        todo=todo,
    )


def _of_network(error: BaseException) -> bool:
    """Whether it is an error of one of the clients that `huggingface_hub` and `datasets` use."""
    return any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__)


def _folder(config: DataConfig, base: Path) -> Path | None:
    """The folder that `path` names, below the YAML file's or the working directory."""
    assert config.path is not None
    return next((place.resolve() for place in (base / config.path, Path(config.path)) if place.is_dir()), None)


def _listing(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return _key([[str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns] for p in files])


def _store() -> Path:
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "mtkd-streams"


def _key(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]


def _write_whole(file: Path, text: str) -> None:
    """Write a file so that no reader sees a part of it."""
    aside = file.with_name(f".{file.name}.{os.getpid()}")
    aside.write_text(text)
    aside.replace(file)
