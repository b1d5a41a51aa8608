"""The `python-stdlib` source: real English prose and real code that every Python installation carries.

`prose` is made of the language-reference topics of `pydoc_data` and of docstrings; `code` of the module sources with
their docstrings taken out (comments stay). Every document belongs to one module (or one topic), and the split is a
pure function of the module's name, so that the prose and the code of a module land in the same split. A paragraph
that occurs twice is kept once: topics quote each other and modules are copied, and a quotation across splits leaks.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import hashlib
import inspect
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtkd.errors import DataError

DOMAINS = ("prose", "code")
SPLITS = ("train", "validation", "test")

DOCUMENT_CHARACTERS = 1_500  # a longer module is cut into several documents
SHORTEST_DOCUMENT = 200  # characters; less says too little to be scored on its own
SHORTEST_DOCSTRING = 80  # characters; shorter ones are captions, not prose
SHORTEST_QUOTATION = 60  # characters; shorter paragraphs ("return self") may repeat

# Percent of the modules; what is left is the test split.
_TRAIN_PERCENT, _VALIDATION_PERCENT = 75, 10

# Tests, what is not the standard library, and generated tables.
_TESTS = ("test", "tests", "idle_test")
_FOREIGN = ("site-packages", "dist-packages", "lib-dynload", "__pycache__", "__phello__")
_TABLES = ("encodings", "pydoc_data")
_SKIPPED_FOLDERS = frozenset((*_TESTS, *_FOREIGN, *_TABLES))
_SKIPPED_MODULES = frozenset(["html.entities", "re._casefix", "stringprep", "sre_constants", "__hello__"])
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-", "test_", "_test")

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Document:
    """One piece of text of one module; `name` is "module#number", the number counting the module's pieces from 1."""

    text: str
    domain: str
    name: str
    split: str


def split_of(module: str) -> str:
    """The split of a module or topic: a pure function of its name."""
    percent = int(hashlib.sha256(module.encode()).hexdigest()[:8], 16) % 100
    if percent < _TRAIN_PERCENT:
        return "train"
    return "validation" if percent < _TRAIN_PERCENT + _VALIDATION_PERCENT else "test"


def stdlib_documents(domains: tuple[str, ...] = DOMAINS, folder: Path | None = None) -> list[Document]:
    """All documents of the wanted domains: prose before code, modules by name, pieces in source order.

    Raises:
        DataError: when this Python installation comes without the sources of its library.
    """
    texts = _installed_texts() if folder is None else _texts(folder)
    documents = [d for domain in DOMAINS if domain in domains for d in _documents(domain, texts[domain])]
    missing = [domain for domain in domains if not any(d.domain == domain for d in documents)]
    if missing:
        raise DataError(
            "this Python installation comes without the sources of its standard library",
            where="@data.source",
            found=f"no {' and no '.join(missing)} documents",
            todo="install the full Python package of your system, or use another data source",
        )
    return documents


@cache
def _installed_texts() -> dict[str, dict[str, list[str]]]:
    """`_texts` of this installation, read once: the `data` entries of a run often differ in their domains only."""
    return _texts(Path(sysconfig.get_paths()["stdlib"]))


def _texts(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Domain -> module (or topic) -> its paragraphs in source order."""
    prose: dict[str, list[str]] = dict(_topics())
    code: dict[str, list[str]] = {}
    with no_garbage_collection():
        for module, source in _sources(folder):
            parsed = parse(source)
            if parsed is not None:
                prose[module] = docstrings(parsed)
                code[module] = strip_docstrings(source, parsed).split("\n\n")
    return {"prose": prose, "code": code}


def docstrings(module: ast.Module) -> list[str]:
    """The paragraphs of all docstrings that are long enough to be prose, in source order, examples left out."""
    by_line: list[tuple[int, list[str]]] = []
    for _, constant in documented(module):
        text = inspect.cleandoc(str(constant.value))
        if len(text) >= SHORTEST_DOCSTRING:
            by_line.append((constant.lineno, [p for p in _paragraphs(text) if ">>>" not in p]))
    return [paragraph for _, paragraphs in sorted(by_line) for paragraph in paragraphs]


def strip_docstrings(source: str, module: ast.Module) -> str:
    """The source without its docstrings; a body that was nothing else becomes `...`, so that it still parses."""
    lines = [line.encode() for line in source.split("\n")]  # the columns of `ast` count UTF-8 bytes
    for node, constant in documented(module):
        first, last = constant.lineno - 1, (constant.end_lineno or constant.lineno) - 1
        before = lines[first][: constant.col_offset]
        after = lines[last][constant.end_col_offset or 0 :].lstrip(b" ;")
        alone = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : last + 1] = [before + (b"... " if alone and after else b"..." if alone else b"") + after] + [
            b"\0"  # keeps later line numbers true; removed below
        ] * (last - first)
        if not lines[first].strip():
            lines[first] = b"\0"
    return "\n".join(line.decode() for line in lines if line != b"\0")


def documented(module: ast.Module) -> Iterator[tuple[_Documented, ast.Constant]]:
    """Every node with a docstring, and the docstring. Expressions are not entered: nothing documented is in them."""
    todo: list[ast.AST] = [module]
    while todo:
        node = todo.pop()
        if isinstance(node, _Documented) and node.body:
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                yield node, first.value
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            inner = getattr(node, block, ())
            if isinstance(inner, list):
                todo.extend(inner)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Syntax trees are millions of small objects: the collector's passes over them cost four times the parsing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _topics() -> Iterator[tuple[str, list[str]]]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python installation comes without pydoc_data", where="@data.source", found=str(error)
        ) from error
    for name in sorted(topics):
        yield f"topic {name}", _paragraphs(topics[name])


def _sources(folder: Path) -> Iterator[tuple[str, str]]:
    """Module names and sources below `folder`, in a fixed order; what cannot be decoded is no source of ours."""
    for module, file in source_files(folder):
        source = read_source_file(file)
        if source is not None:
            yield module, source


def source_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Names and files of the modules below `folder`, in a fixed order; tests and generated tables are left out."""
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(_SKIPPED_PREFIXES))
        for file in sorted(files):
            name, extension = os.path.splitext(file)
            parts = (*Path(root).relative_to(folder).parts, name)
            module = ".".join(parts[:-1] if name == "__init__" and len(parts) > 1 else parts)
            if extension != ".py" or name.startswith(_SKIPPED_PREFIXES) or module in _SKIPPED_MODULES:
                continue
            yield module, Path(root, file)


def read_source_file(file: Path) -> str | None:
    """The source of a module; None where it cannot be decoded."""
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError, SyntaxError):
        return None


def parse(source: str) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not our business
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


def _documents(domain: str, texts: dict[str, list[str]]) -> Iterator[Document]:
    paragraphs: set[str] = set()
    pieces: set[str] = set()
    for module in sorted(texts):
        parts = [part for paragraph in texts[module] if paragraph.strip() for part in _parts(paragraph)]
        unique = [part for part in parts if not _repeated(part, paragraphs)]
        new = [piece for piece in _pieces(unique) if not _repeated(piece, pieces)]
        for number, piece in enumerate(new, start=1):
            yield Document(piece, domain, f"{module}#{number}", split_of(module))


def _repeated(paragraph: str, seen: set[str]) -> bool:
    """Whether a longer paragraph was there before, white space apart; remembers it."""
    key = " ".join(paragraph.split())
    if len(key) < SHORTEST_QUOTATION:
        return False
    before = key in seen
    seen.add(key)
    return before


def _paragraphs(text: str) -> list[str]:
    return [p.strip("\n") for p in text.split("\n\n") if p.strip()]


def _pieces(parts: list[str]) -> Iterator[str]:
    """Paragraphs joined to documents of about DOCUMENT_CHARACTERS; a short rest goes to the piece before it."""
    pieces: list[list[str]] = [[]]
    sizes = [0]
    for part in parts:
        if sizes[-1] and sizes[-1] + len(part) + 2 > DOCUMENT_CHARACTERS:
            pieces.append([])
            sizes.append(0)
        pieces[-1].append(part)
        sizes[-1] += len(part) + 2
    if len(pieces) > 1 and sizes[-1] < SHORTEST_DOCUMENT:
        rest, rest_size = pieces.pop(), sizes.pop()
        pieces[-1] += rest
        sizes[-1] += rest_size
    for piece, size in zip(pieces, sizes, strict=True):
        if size >= SHORTEST_DOCUMENT:
            yield "\n\n".join(piece) + "\n"


def _parts(paragraph: str) -> Iterator[str]:
    """A paragraph, cut at line ends where it is longer than a document."""
    lines: list[str] = []
    size = 0
    for line in paragraph.strip("\n").split("\n"):
        if lines and size + len(line) + 1 > DOCUMENT_CHARACTERS:
            yield "\n".join(lines)
            lines, size = [], 0
        lines.append(line)
        size += len(line) + 1
    yield "\n".join(lines)
