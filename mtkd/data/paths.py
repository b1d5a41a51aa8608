"""Which files a `data` block names: paths, lists and patterns of them, saved folders, and what each one is."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mtkd.data.progress import Working
from mtkd.errors import DataError, UserError, what_is

if TYPE_CHECKING:
    from mtkd.config import DataConfig

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
KINDS = {f".{kind}": kind for kind in ("jsonl", "json", "csv", "tsv", "parquet", "txt")} | {".ndjson": "jsonl"}
PACKED = (".gz", ".bz2", ".xz", ".zst")
"""Compressions, behind the extension of what is inside: a.csv.gz."""
SAVED = "saved"
"""The kind of a folder that `save_to_disk` wrote."""

_PLAIN = ("jsonl", "json", "csv", "tsv", "txt")
_TABLES = ("csv", "tsv")
_ALLOWED = f"{' '.join(KINDS)}, all but .parquet also with {' '.join(PACKED)} behind it, or a folder of save_to_disk"
_WAYS = {
    (".xlsx", ".xls", ".xlsm", ".ods", ".numbers"): "export the sheet as CSV in UTF-8",
    (
        ".arrow",
        ".feather",
        ".orc",
        ".avro",
    ): "write the rows as Parquet (`Dataset.to_parquet`, `DataFrame.to_parquet`), "
    "or give the folder that `save_to_disk` wrote",
    (
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
        ".npy",
        ".npz",
        ".joblib",
        ".rds",
        ".rdata",
        ".mat",
        ".h5",
        ".hdf5",
    ): "write the rows as JSON lines or CSV with the program that made the file",
    (".zip", ".tar", ".tgz", ".7z", ".rar"): "unpack the archive and name the files in it",
    (".lz4", ".br", ".z", ".lzma", ".snappy"): f"compress with one of {' '.join(PACKED)}",
    (".db", ".sqlite", ".sqlite3", ".sql", ".duckdb"): "export the table as CSV",
    (".html", ".htm", ".xml", ".pdf", ".doc", ".docx", ".rtf", ".md", ".tex"): "write its text into a .txt file",
    (".yaml", ".yml", ".toml", ".py"): "write the rows as JSON lines",
    (".data", ".tab", ".dat", ".psv", ".ssv"): "call a table .csv and set `separator`",
}


@dataclass(frozen=True)
class DataFile:
    """A file, or a saved folder, that rows are read from.

    Attributes:
        path: where it is. name: what messages call it.
        kind: a value of `KINDS`, or `SAVED`. packed: its compression, "" for none.
        separator: of a table, as given; "": that of its kind.
        columns: names of a table's columns, where the file has no header line.
    """

    path: Path
    name: str
    kind: str
    packed: str = ""
    separator: str = ""
    columns: tuple[str, ...] = ()

    @property
    def is_table(self) -> bool:
        """Whether it has lines of values, and a separator between them."""
        return self.kind in _TABLES


def find_files(config: DataConfig, base: Path, where: str = "@data") -> dict[Split, tuple[DataFile, ...]]:
    """Split -> its existing files in order, looked for below `path` in `base`, then in the working directory.

    A list keeps its order, the matches of a pattern are sorted by name; a file that two patterns match is read once.

    Raises:
        UserError: no file given, a file named twice, or a kind that is not read.
        DataError: a file that does not exist, a pattern that nothing matches.
    """
    if not config.files:
        return _saved_splits(config, base, where)
    chosen: dict[Split, tuple[DataFile, ...]] = {}
    for split in SPLITS:
        if split not in config.files:
            continue
        entry, place = config.files[split], f"{where}.files.{split}"
        names = [entry] if isinstance(entry, str) else list(entry)
        if not names:
            raise UserError("no file is named", where=place, allowed="a path, a pattern, or a list of them")
        files: dict[Path, DataFile] = {}
        for i, name in enumerate(names):
            at = place if isinstance(entry, str) else f"{place}[{i}]"
            if name in names[:i]:
                raise UserError("the file is named twice", where=at, found=name, todo="drop one of them")
            for path, shown in _matches(name, config, base, at):
                files.setdefault(path.resolve(), _described(path, shown, config, split, at))
        chosen[split] = tuple(files.values())
    return chosen


def file_digest(files: Mapping[Split, Sequence[DataFile]]) -> str:
    """sha256 over the bytes of all files in order, the splits they are for, and what is said of how to read them."""
    digest = hashlib.sha256()
    for split, parts in files.items():
        for file in parts:
            digest.update(f"{split}:{_digest(file)};".encode())
            if file.separator or file.columns:
                digest.update(json.dumps([file.separator, file.columns]).encode())
    return digest.hexdigest()


def bytes_of(files: Sequence[DataFile]) -> int | None:
    """Bytes of plain text, an upper bound of its tokens; None where only reading tells."""
    plain = all(file.kind in _PLAIN and not file.packed for file in files)
    return sum(file.path.stat().st_size for file in files) if plain else None


def saved_parts(folder: Path) -> list[Path]:
    """The files with the rows of a folder that `Dataset.save_to_disk` wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError: what it says of itself cannot be read.
    """
    state = json.loads((folder / "state.json").read_text())
    names = [part["filename"] for part in state["_data_files"]]
    if any(Path(name).name != name for name in names):
        raise ValueError(f"a file outside of the folder: {names}")
    return [folder / name for name in names]


def _digest(file: DataFile) -> str:
    """sha256 of a file's bytes; of a saved folder over those of its rows' files, and the types of its columns.

    The names of classes, in their order, stand in these types alone: the rows have numbers.
    """
    if file.kind != SAVED:
        return _sha256(file.path, file.name)
    try:
        types = json.loads((file.path / "dataset_info.json").read_text())["features"]
        parts = [_sha256(part, file.name) for part in saved_parts(file.path)]
        return hashlib.sha256(" ".join([*parts, json.dumps(types, sort_keys=True)]).encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken_folder(file, error) from error


def _sha256(path: Path, name: str) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream, Working(f"checksum of {name}", path.stat().st_size, unit="bytes") as working:
        while block := stream.read(2**22):
            digest.update(block)
            working.at(stream.tell())
    return digest.hexdigest()


def broken_folder(file: DataFile, error: BaseException) -> DataError:
    return DataError(
        "the saved data set cannot be read",
        where=file.name,
        found=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}",
        todo="write it again with `save_to_disk`",
    )


def _saved_splits(config: DataConfig, base: Path, where: str) -> dict[Split, tuple[DataFile, ...]]:
    """The splits of a data set that was saved to the folder `path`."""
    folders = [folder / (config.path or "") for folder in (base, Path.cwd())]
    folder = next((place for place in folders if config.path and place.is_dir()), None)
    if folder is None or _saved(folder) == "":
        raise UserError(
            "source 'files' needs `files`, or a `path` that `save_to_disk` wrote",
            where=f"{where}.files",
            found=None if config.path is None else f"path: {config.path}",
            allowed="train, validation, test: a path, a pattern, or a list of them",
        )
    if _saved(folder) == "rows":
        return {"train": (_described(folder, config.path or "", config, "train", f"{where}.path"),)}
    splits = _splits_in(folder, config.path or "")
    if not set(splits) & set(SPLITS):
        raise DataError(
            "none of the saved splits is called train, validation or test",
            where=f"{where}.path",
            found=", ".join(splits),
            allowed=SPLITS,
            todo=f"name them: files: {{train: {splits[0] if splits else 'NAME'}, ...}}",
        )
    return {
        split: (_described(folder / split, f"{config.path}/{split}", config, split, f"{where}.path"),)
        for split in SPLITS
        if split in splits
    }


def _saved(folder: Path) -> str:
    """What `save_to_disk` wrote to a folder: "rows" of one split, several "splits", or "" where it did not."""
    if (folder / "dataset_dict.json").is_file():
        return "splits"
    return "rows" if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file() else ""


def _splits_in(folder: Path, name: str) -> list[str]:
    try:
        return [str(split) for split in json.loads((folder / "dataset_dict.json").read_text())["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise broken_folder(DataFile(folder, name, SAVED), error) from error


def _matches(name: str, config: DataConfig, base: Path, place: str) -> list[tuple[Path, str]]:
    """The files that a name or a pattern stands for, and what messages call each."""
    if "://" in name:
        raise UserError("files are read from disk", where=place, found=name, todo="download it, or use source: hub")
    below = Path(config.path or "")
    folders = [folder / below for folder in (base, Path.cwd())]
    for folder in folders:
        if (folder / name).is_file() or (folder / name).is_dir():
            return [(folder / name, str(below / name))]
        if not _is_pattern(name) and (folder / name).exists():
            raise DataError(
                f"this is {what_is(folder / name)}", where=place, found=str(below / name), allowed="a file, or a folder"
            )
    pattern = _is_pattern(name)
    if not pattern:
        _kind(Path(name), str(below / name), place)
    for folder in folders if pattern else ():
        matches = sorted(glob.glob(name, root_dir=folder, recursive=True))
        paths = {folder / match: str(below / match) for match in matches}
        for path, shown in paths.items():
            if path.exists() and not path.is_file() and not path.is_dir():
                raise DataError(f"the pattern matches what is no file: {what_is(path)}", where=place, found=shown)
        chosen = [path for path in paths if path.is_file() or (path.is_dir() and _saved(path))]
        whole = {path for path in chosen if path.is_dir()}
        if chosen:  # the files of a saved folder are read with it
            return [(path, paths[path]) for path in chosen if whole.isdisjoint(path.parents)]
    raise DataError(
        "no file matches" if pattern else "no such file",
        where=place,
        found=str(below / name),
        allowed="a path relative to the YAML file, or to the working directory",
    )


def _is_pattern(name: str) -> bool:
    return any(character in name for character in "*?[")


def _described(path: Path, shown: str, config: DataConfig, split: Split, place: str) -> DataFile:
    """What a path is; refuses what is not read, with what to do instead."""
    if path.is_dir():
        return _described_folder(path, shown, config, split, place)
    kind, packed = _kind(path, shown, place)
    if not os.access(path, os.R_OK):
        raise DataError("the file may not be read", where=place, found=shown, todo="change its permissions")
    file = DataFile(path, shown, kind, packed, config.separator or "", config.columns)
    for key in ("separator", "columns"):
        if getattr(config, key) and not file.is_table:
            where = f"{place.partition('.files')[0]}.{key}"
            raise UserError(f"only tables have it (.csv, .tsv), and {shown} is none", where=where, todo="drop it")
    return file


def _kind(path: Path, shown: str, place: str) -> tuple[str, str]:
    """What a file is by its name, and its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    packed = suffixes.pop() if suffixes and suffixes[-1] in PACKED else ""
    extension = suffixes[-1] if suffixes else ""
    kind = KINDS.get(extension, "")
    if not kind or (packed and kind == "parquet"):
        todo = _way_out(extension, packed)
        raise UserError("this kind of file is not read", where=place, found=shown, allowed=_ALLOWED, todo=todo)
    return kind, packed


def _described_folder(path: Path, shown: str, config: DataConfig, split: Split, place: str) -> DataFile:
    kind = _saved(path)
    if kind == "":
        raise UserError(
            "the folder is none that `save_to_disk` wrote",
            where=place,
            found=shown,
            todo=f"name its files, e.g. {shown.rstrip('/')}/*.jsonl",
        )
    if config.separator or config.columns:
        key = "columns" if config.columns else "separator"
        raise UserError(
            "only tables have it (.csv, .tsv)", where=f"{place.partition('.files')[0]}.{key}", todo="drop it"
        )
    if kind == "splits":
        splits = _splits_in(path, shown)
        if split not in splits:
            todo = f"name one of them, e.g. {shown.rstrip('/')}/{splits[0] if splits else 'NAME'}"
            raise DataError(
                f"the saved data set has no {split} split", where=place, found=shown, allowed=splits, todo=todo
            )
        path, shown = path / split, f"{shown.rstrip('/')}/{split}"
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            problem = f"{shown}/{entry.name} is {what_is(entry)}"
            raise DataError("the saved data set has an entry that cannot be read", where=place, found=problem)
    return DataFile(path, shown, SAVED)


def _way_out(extension: str, packed: str) -> str:
    if packed and extension == ".parquet":
        return "unpack it: Parquet is compressed inside"
    if packed and not extension:
        return f"name it after what is in it, e.g. .jsonl{packed}"
    if packed and extension == ".tar":
        return "unpack the archive and name the files in it"
    return next((way for extensions, way in _WAYS.items() if extension in extensions), "write the rows as JSON lines")
