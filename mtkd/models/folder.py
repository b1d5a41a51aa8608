"""Where a model's files are, and whether they may be opened: hub ids, cards, stages, packages become checked folders.

A model folder is data from others. It may point outside itself (shard names, links), ask for code (remote code,
attention kernels from the hub) or be code (pickle). All of that is refused before a file outside is opened.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any

from mtkd.errors import DataError, UserError, nearest
from mtkd.models.cards import how_to_get, load_cards, missing_glm
from mtkd.models.formats import FORMATS

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
MAP_FILE = "vocabulary_map.json"
"""Next to a model with a compressed vocabulary; see `mtkd.models.vocabulary`."""
PACKAGE_PREFIX = "package:"
"""Of a model that a Python package brings: `package:NAME/FOLDER`."""
_CONFIGS = ["config.json", "generation_config.json"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CODE_HINT = "use a model whose architecture transformers has itself"
_GLM_HINT = "mtkd has this architecture itself, if it is the GLM of 2022: mtkd convert-glm FOLDER OUT, and use OUT"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "tekken.json")
_TOKENIZER_MODELS = ("*.model", "*.tiktoken")
_FILES = (".json", ".safetensors", ".txt", ".jinja", ".model")
"""Endings of what models and tokenizers are read from."""
_MOST_FILES = 100_000
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def find_folder(path: str, revision: str | None, resolve: Callable[[str], Path | str], *, weights: bool) -> Path:
    """The checked local folder of a model; a hub model is downloaded into the cache first.

    Args:
        path: folder, hub id, card name or ``stage:NAME``.
        revision: of a hub model; default: the card's.
        resolve: maps ``stage:NAME`` and relative folders to folders; returns anything else as it is.
        weights: also the weights, not only the configuration.

    Raises:
        UserError: a name that is neither a folder, a card nor a hub id.
        DataError: a folder that is unsafe or incomplete, or a failed download.
    """
    card = load_cards().get(path)
    if (glm := missing_glm(path, resolve)) is not None:
        raise UserError("this model is not here", where="@model.path", found=path, todo=how_to_get(glm))
    place = Path(resolve(path))
    if place.is_dir():
        folder = place
    else:
        folder = _download(card.source if card else path, revision or (card.revision if card else None), weights)
    check_folder(folder, weights=weights)
    return folder


def package_folder(path: str) -> Path:
    """The folder that `package:NAME/FOLDER` names, inside an installed Python package; nothing is imported.

    Raises:
        UserError: another form, a package that is not installed, or one without the folder.
    """
    name, _, inside = path.removeprefix(PACKAGE_PREFIX).partition("/")
    if not name.isidentifier() or PurePosixPath(inside).is_absolute() or ".." in PurePosixPath(inside).parts:
        raise UserError(
            "not a folder of a Python package",
            where="@model.path",
            found=path,
            allowed=f"{PACKAGE_PREFIX}NAME or {PACKAGE_PREFIX}NAME/FOLDER: the name that `import` knows, without dots",
        )
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # a module without a specification, such as __main__
        spec = None
    if spec is None:
        todo = f"pip install {name.replace('_', '-')}, into the environment that mtkd runs in"
        raise UserError("this Python package is not installed", where="@model.path", found=name, todo=todo)
    for place in spec.submodule_search_locations or ():
        if (folder := Path(place, inside)).is_dir():
            return folder
    raise UserError(
        f"the Python package '{name}' has no such folder",
        where="@model.path",
        found=inside or path,
        allowed=[str(place) for place in spec.submodule_search_locations or ()] or "a package, and this is a module",
        todo="name the folder with config.json and model.safetensors, from the package's own folder on",
    )


def check_folder(folder: Path, *, weights: bool = True) -> None:
    """Refuse a model folder that would open files outside itself or run code.

    Raises:
        DataError: naming the file and the entry.
    """
    check_links(folder)
    if not (folder / "config.json").is_file():
        raise DataError("not a model folder: config.json is missing", where=str(folder))
    if (folder / "adapter_config.json").exists():
        raise DataError(
            "the folder holds an adapter, not a model", where=str(folder), todo="merge it into its base model first"
        )
    _check_config(folder / "config.json")
    if weights:
        _check_weights(folder)


def check_links(folder: Path) -> None:
    """Refuse a folder with a link that leads out of it, at any depth, or with what is neither file nor folder.

    Raises:
        DataError: naming the link; also for a folder of more than `_MOST_FILES`, which is no model's.
    """
    root, seen = _root(folder), 0
    for parent, folders, names in os.walk(folder):
        for name in sorted(folders + names):
            path, seen = Path(parent) / name, seen + 1
            if seen > _MOST_FILES:
                raise DataError(
                    "too many files for a model's or tokenizer's folder",
                    where=str(folder),
                    found=f"more than {_MOST_FILES:,}",
                    todo="name the folder of the model alone",
                )
            _check_entry(path, root)


def _check_entry(path: Path, root: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        try:
            inside = path.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # links that lead to each other
            inside = False
        if not inside:
            raise DataError("a link leaves the model folder", where=str(path), found=str(path.readlink()))
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise DataError("neither a file nor a folder: reading it could wait for ever", where=str(path))
    if stat.S_ISDIR(mode) and path.suffix in _FILES:
        raise DataError("a folder stands where a file belongs", where=str(path))


def check_tokenizer_folder(folder: Path) -> None:
    """Refuse a folder of a tokenizer that would open files outside itself or needs code; a model need not be in it.

    Raises:
        DataError: naming the file and the entry.
    """
    check_links(folder)
    if (folder / "config.json").is_file():
        _check_code(folder / "config.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZERS) or any(
        True for pattern in _TOKENIZER_MODELS for _ in folder.glob(pattern)
    )


def _root(folder: Path) -> Path:
    """What links may point into: the folder, or the whole model in the hub's cache, whose snapshots link to blobs."""
    folder = folder.resolve()
    cached = folder.parent.name == "snapshots" and folder.parent.parent.name.startswith("models--")
    return folder.parent.parent if cached else folder


def _check_code(file: Path) -> None:
    for place, key, value in _entries(_read_json(file), ""):
        if key == "auto_map" and value:
            raise DataError(
                "the model needs code from its folder, and remote code is off",
                where=f"{file}: {place}",
                found=value,
                todo=_GLM_HINT if "modeling_glm.GLM" in str(value) else _CODE_HINT,
            )


def _check_config(file: Path) -> None:
    _check_code(file)
    for place, key, value in _entries(_read_json(file), ""):
        if ("attn_implementation" in key or "experts_implementation" in key) and "/" in str(value):
            raise DataError("the model asks for a kernel from the hub", where=f"{file}: {place}", found=value)
        if key == "transformers_weights" and value:
            raise DataError("the configuration redirects its weights", where=f"{file}: {place}", found=value)
        if key == "quantization_config" and value:
            name = value.get("quant_method") if isinstance(value, dict) else None
            if place != key or name not in FORMATS:
                raise DataError(
                    "quantised weights are not supported", where=f"{file}: {place}", todo="use the full weights"
                )


def _entries(value: Any, place: str) -> Iterator[tuple[str, str, Any]]:
    """Every (place, key, value) of nested JSON."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in pairs:
        here = f"{place}.{key}" if place else str(key)
        yield here, str(key), inner
        yield from _entries(inner, here)


def _check_weights(folder: Path) -> None:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    for index in indexes:
        for name in shard_names(index):
            if not (folder / name).is_file():
                raise DataError("a shard is missing", where=str(index), found=name)
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise DataError(
            "the weights are pickle files, which can run code when they are read",
            where=str(folder),
            found=pickles[:3],
            allowed=f"{WEIGHTS} or {INDEX} with its shards",
            todo="convert them where you trust their origin: load the model there and save_pretrained(folder)",
        )
    raise DataError("the folder has no weights", where=str(folder), allowed=f"{WEIGHTS} or {INDEX} with its shards")


def shard_names(index: Path, suffixes: tuple[str, ...] = (".safetensors",)) -> list[str]:
    """The shards an index names.

    Args:
        suffixes: what their names may end in.

    Raises:
        DataError: an entry that is not a plain file name: it would be opened wherever it points.
    """
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError("the index has no weight_map", where=str(index))
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and not re.search(r"[/\\\0]", name) and name not in (".", "..")
        if not plain or not name.endswith(suffixes):
            raise DataError(
                f"a shard name leaves the folder or is no {suffixes[0].removeprefix('.')} file",
                where=f"{index}: weight_map[{tensor!r}]",
                found=name,
                allowed=f"a plain file name ending in {' or '.join(suffixes)}",
            )
    return sorted(set(weight_map.values()))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot be read as JSON: {error}", where=str(file)) from error
    if not isinstance(value, dict):
        raise DataError("is not a JSON object", where=str(file))
    return value


def _download(source: str, revision: str | None, weights: bool) -> Path:
    """Fetch configuration and weights of a hub model; shard names are checked before they are asked for."""
    if not _HUB_ID.fullmatch(source) or ".." in source:
        raise UserError(
            "no such model folder, and not a hub id",
            where="@model.path",
            found=source,
            allowed="a folder, owner/name on the hub, a card in teachers/, stage:NAME, or package:NAME/FOLDER",
            todo=nearest(source, load_cards()) or "fetch a checkpoint given by a URL by hand and name its folder",
        )
    from huggingface_hub import snapshot_download

    try:
        first = [*_CONFIGS, WEIGHTS, INDEX] if weights else _CONFIGS
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=first))
        if weights and (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():
            shards = shard_names(folder / INDEX)
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=[*first, *shards]))
    except DataError:
        raise
    except Exception as error:  # network, missing or gated repositories: hub and HTTP errors share no base class
        reason = (str(error).strip().splitlines() or [""])[0]
        raise DataError(
            f"the model cannot be fetched from the hub: {type(error).__name__}: {reason}",
            where="@model.path",
            found=source,
            todo=nearest(source, load_cards()) or "check the name and the network, or give a folder",
        ) from error
    if weights and not (folder / WEIGHTS).is_file() and not (folder / INDEX).is_file():
        raise DataError(
            "the hub has no safetensors of this model",
            where="@model.path",
            found=source,
            todo="download and convert it where you trust its origin (a GLM: mtkd convert-glm), and give the folder",
        )
    return folder
