"""The `python-docstrings` source: docstrings of the installed packages, the package that each comes from is its label.

Every installation of mtkd has them: the packages are those that mtkd needs, and those that these need. The classes are
the packages with the most docstrings, chosen by counting, so no list of them stands anywhere. The answer must not stand
in the text: names of packages (their own and all others) are taken out, of a dotted name the last part stays.
The split is a pure function of the module's name, so train and test share no module; a text is there once, and one that
two packages have (copied code) not at all.
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from mtkd.data.stdlib import documented, no_garbage_collection, parse, read_source_file, source_files, split_of
from mtkd.errors import DataError

SUBJECTS = ("numbers", "learning", "tools")
"""Domains of the rows: what a package is for."""

MOST_CLASSES = 20
MOST_PER_CLASS = 360
LEAST_PER_CLASS = 150
"""Docstrings; a package with fewer is no class."""
MOST_PER_MODULE = 8
"""Docstrings; a class is not to be the text of its longest module."""
_READ = MOST_PER_CLASS * 5 // 4
"""Docstrings that are read of a package at most, before those are left out that others have too."""
_LARGEST = 40_000
"""Characters of a module: a larger one gives no more docstrings, and reading them all would take most of the time."""
SHORTEST, LONGEST = 60, 600
"""Characters: a shorter docstring is a caption, and of a longer one the beginning is kept."""

_SUBJECT = {
    **dict.fromkeys(("matplotlib", "mpmath", "networkx", "numpy", "pandas", "scipy", "sympy"), "numbers"),
    **dict.fromkeys(("datasets", "deepspeed", "huggingface_hub", "torch", "transformers"), "learning"),
}
"""By package; any other is one of the tools."""

_COPIES = frozenset(["_vendor", "_vendored", "vendor", "externals", "extern", "third_party", "thirdparty"])
_ALIASES = ("np", "pd", "plt", "mpl", "nx", "hf", "hugging face", "huggingface", "pillow", "pytorch", "mplot3d")
"""Other words for a package that docstrings use."""
_LONG = 5
"""Letters from which on a package's name is no other word."""
_ADDRESS = re.compile(r"https?://\S+")
_DOTTED = re.compile(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")


@dataclass(frozen=True)
class Docstring:
    """A docstring without the names of packages; `name` is "module#number", the number counting the module's from 1."""

    text: str
    label: str
    domain: str
    name: str
    split: str


def docstring_rows(folders: dict[str, Path] | None = None) -> list[Docstring]:
    """The docstrings of the classes, by package, module and place.

    Args:
        folders: package -> its folder; default: the packages of this installation.

    Raises:
        DataError: fewer than two packages have enough docstrings, as where they are installed without their sources.
    """
    return list(_installed()) if folders is None else _rows(folders)


@cache
def _installed() -> tuple[Docstring, ...]:
    return tuple(_rows(_packages("mtkd")))


def _packages(root: str) -> dict[str, Path]:
    """Package -> folder, of a distribution's requirements and of theirs; the root's own are not among them."""
    found: dict[str, Path] = {}
    seen, todo = {_normal(root)}, [root]
    while todo:
        name = todo.pop()
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # of another platform
            continue
        wanted = [re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in distribution.requires or () if "extra ==" not in r]
        todo += [other for other in wanted if _normal(other) not in seen]
        seen |= {_normal(other) for other in wanted}
        if name == root:
            continue
        for file in distribution.files or ():
            if file.name == "__init__.py" and len(file.parts) == 2:
                found[file.parts[0]] = Path(str(distribution.locate_file(file.parts[0])))
    return dict(sorted(found.items()))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _rows(folders: dict[str, Path]) -> list[Docstring]:
    hidden = _names(folders)
    with no_garbage_collection():
        found = {package: _package_rows(package, folder, hidden) for package, folder in sorted(folders.items())}
    owners = Counter(key for rows in found.values() for key in {_key(row.text) for row in rows})
    kept = {p: [row for row in rows if owners[_key(row.text)] == 1][:MOST_PER_CLASS] for p, rows in found.items()}
    large = sorted((p for p in kept if len(kept[p]) >= LEAST_PER_CLASS), key=lambda p: (-len(kept[p]), p))
    if len(large) < 2:
        raise DataError(
            "the installed packages come without enough docstrings to be classes",
            where="@data.source",
            found=f"{len(large)} packages with {LEAST_PER_CLASS} docstrings or more",
            allowed="two or more",
            todo="install mtkd and its requirements with pip, with their sources, or use another data source",
        )
    return [row for package in sorted(large[:MOST_CLASSES]) for row in kept[package]]


def _package_rows(package: str, folder: Path, hidden: re.Pattern[str]) -> list[Docstring]:
    """Docstrings of a package, each text once: modules in an order by their names' digests, so that a part is fair."""
    modules = {f"{package}.{m}" if m != "__init__" else package: file for m, file in source_files(folder)}
    rows: list[Docstring] = []
    seen: set[str] = set()
    for module in sorted(modules, key=lambda m: hashlib.sha256(m.encode()).digest()):
        if len(rows) >= _READ or not _COPIES.isdisjoint(module.split(".")):
            continue
        number = 0
        for text in _docstrings(modules[module]):
            text = _without_names(text, hidden)
            if len(text) < SHORTEST or _key(text) in seen or number == MOST_PER_MODULE:
                continue
            seen.add(_key(text))
            number += 1
            domain = _SUBJECT.get(package, "tools")
            rows.append(Docstring(text, package, domain, f"{module}#{number}", split_of(module)))
    return rows


def _docstrings(file: Path) -> list[str]:
    """The docstrings of a file in source order, examples left out."""
    source = read_source_file(file)
    module = parse(source) if source is not None and len(source) <= _LARGEST else None
    if module is None:
        return []
    found = sorted((c.lineno, inspect.cleandoc(str(c.value))) for _, c in documented(module))
    return ["\n".join(line for line in text.splitlines() if not line.lstrip().startswith(">>>")) for _, text in found]


def _names(folders: dict[str, Path]) -> re.Pattern[str]:
    """What stands for a package: a long name anywhere ("DeepSpeedEngine"), a short one where no letter touches it."""
    words = sorted({*folders, *(name.replace("_", " ") for name in folders), *_ALIASES}, key=lambda w: (-len(w), w))
    long = "|".join(re.escape(word) for word in words if len(word) >= _LONG)
    return re.compile(f"{long}|(?<![a-z])(?:{'|'.join(map(re.escape, words))})(?![a-z])", re.IGNORECASE)


def _without_names(text: str, hidden: re.Pattern[str]) -> str:
    text = _ADDRESS.sub("", text[: 2 * LONGEST])
    text = _DOTTED.sub(lambda found: found[0].rsplit(".", 1)[1], text)
    return " ".join(hidden.sub("", text).split())[:LONGEST]


def _key(text: str) -> str:
    """Equal for texts that differ in case, digits and punctuation only."""
    return re.sub(r"[\W\d_]+", "", text.lower())
