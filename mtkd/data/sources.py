"""Data sources: functions from a `data` block to datasets per split. Registered: python-stdlib,
python-docstrings, files, hub, random-tokens.

A source knows nothing of tasks and tokenizers. What all of them share happens once, in `choose_rows`: the hold-out of
a validation split and the choice of at most `limit` rows, both by the seed of the `data` block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtkd.config import MIX, RANDOM_TOKENS, STAGE, DataConfig
from mtkd.data.choice import SPLITS, hold_out, limit, two_validations
from mtkd.data.docstrings import SUBJECTS, Docstring, docstring_rows
from mtkd.data.files import Origin, columns_of, nearest_column, read_files
from mtkd.data.hub import hub_rows
from mtkd.data.labels import class_codes, find_labels
from mtkd.data.mixed import check_parts, mixed_rows
from mtkd.data.paths import DataFile, file_digest, find_files
from mtkd.data.progress import Working
from mtkd.data.raw import Raw
from mtkd.data.specialist import relabelled
from mtkd.data.stagedata import stage_rows_of
from mtkd.data.stdlib import DOMAINS, Document, stdlib_documents
from mtkd.data.tables import missing_column_hint
from mtkd.data.tasks import check_task
from mtkd.data.turns import written_turns
from mtkd.errors import DataError, UserError, nearest
from mtkd.registry import SOURCES, TASKS

if TYPE_CHECKING:
    pass

# The fields of a `data` block that only some sources read.
_SOURCE_FIELDS = (
    "path",
    "subset",
    "revision",
    "files",
    "separator",
    "columns",
    "splits",
    "stream",
    "domains",
    "documents",
    "mix",
    "stage",
)
_READ_BY: dict[str, tuple[str, ...]] = {
    "python-stdlib": ("domains",),
    "python-docstrings": ("domains",),
    "files": ("path", "files", "separator", "columns"),
    "hub": ("path", "subset", "revision", "splits", "stream"),
    RANDOM_TOKENS: ("documents",),
    MIX: ("mix",),
    STAGE: ("stage",),
}


_DOMAINS = {"python-stdlib": DOMAINS, "python-docstrings": SUBJECTS}


def read_source(config: DataConfig, base: Path) -> Raw:
    """Every row of a source that `check_source` has passed.

    Args:
        base: folder of the YAML file; relative paths are looked for there first, then in the working directory.

    Raises:
        UserError, DataError: naming the file and row where there is one.
    """
    raw: Raw = SOURCES.find(config.source, "@data.source")(config, base)
    for split, rows in raw.splits.items():
        if not len(rows):
            raise DataError("the split has no rows", where=raw.origin(split).name, found="0 rows")
    return raw if config.messages is None else _with_turns(raw, config)


def _with_turns(raw: Raw, config: DataConfig) -> Raw:
    """The rows of chats with their turns as checked JSON."""
    import pyarrow as pa
    from datasets import Dataset

    assert config.messages is not None
    splits = {}
    for split, rows in raw.splits.items():
        turns = pa.array(written_turns(rows, config, raw.origin(split)), pa.large_string())
        others = rows.remove_columns(config.messages)
        # with names of their own: else every byte is hashed for a cache that is not used
        if others.column_names:
            splits[split] = others.add_column(config.messages, turns, new_fingerprint="mtkd")
        else:
            splits[split] = Dataset(pa.table({config.messages: turns}), fingerprint="mtkd")
    return replace(raw, splits=splits)


def choose_rows(raw: Raw, config: DataConfig) -> Raw:
    """Hold out the validation split of what `read_source` gave, and apply the limits.

    Raises:
        UserError, DataError: a split that does not exist, or too few rows.
    """

    def codes(rows: Raw, split: str) -> np.ndarray | None:
        if labels is None or labels.kind != "class":
            return None
        return class_codes(config, rows.splits[split], rows.origin(split), labels.names)

    with Working("choosing rows", 3, "steps") as working:
        raw = relabelled(config, raw)
        labels = find_labels(config, raw) if has_labels(config) else None
        working.at(1)
        divided = hold_out(raw, config, codes)
        working.at(2)
        chosen = replace(limit(divided, config, codes), labels=labels)
    if config.parts:
        check_parts(config, chosen)
    choice = ""
    if config.validation_share or config.limit or config.skip:
        by = " by class" if labels is not None and labels.kind == "class" else ""
        choice = f"{raw.fingerprint} {config.seed} {config.validation_share} {sorted(config.limit.items())}{by}"
        choice += f" after {sorted(config.skip.items())}" if config.skip else ""
    if config.specialist is not None:
        choice = f"{choice or raw.fingerprint} {config.seed} {config.specialist.model_dump_json()} {config.labels}"
    if labels is not None and labels.by_values:
        choice = f"{choice or raw.fingerprint} {labels.kind} {labels.names}"
    return replace(chosen, fingerprint=hashlib.sha256(choice.encode()).hexdigest()) if choice else chosen


def has_labels(config: DataConfig) -> bool:
    """Whether the task of a `data` block reads a column of labels."""
    return "label" in TASKS.find(config.task).fields


def check_source(config: DataConfig, base: Path, where: str = "@data") -> None:
    """Refuse before reading: unknown source or task, options that are not read, missing files or columns.

    Raises:
        UserError, DataError: naming the field.
    """
    SOURCES.find(config.source, f"{where}.source")
    check_task(config, where)
    read = _READ_BY.get(config.source, _SOURCE_FIELDS)
    for name in _SOURCE_FIELDS:
        if name not in read and getattr(config, name):
            raise UserError(
                f"source '{config.source}' does not read this",
                where=f"{where}.{name}",
                found=getattr(config, name),
                allowed=read,
                todo="drop it, or choose the source that reads it",
            )
    known = _DOMAINS.get(config.source, config.domains)
    for domain in config.domains:
        if domain not in known:
            todo = nearest(domain, known)
            raise UserError("unknown domain", where=f"{where}.domains", found=domain, allowed=known, todo=todo)
    if config.source == "hub" and not config.path:
        raise UserError("source 'hub' needs `path`", where=f"{where}.path", allowed="a dataset id, e.g. nyu-mll/glue")
    if config.source == RANDOM_TOKENS:
        _check_random_tokens(config, where)
    if config.source == MIX and not TASKS.find(config.task).token_level:
        raise UserError(
            "texts are mixed, not classes", where=f"{where}.task", found=config.task, allowed="tasks of language models"
        )
    if config.source in _DOMAINS and config.validation_share:
        raise two_validations(where)
    if config.source == "files":
        files = find_files(config, base, where)
        if "validation" in files and config.validation_share:
            raise two_validations(where)
        for file in (file for parts in files.values() for file in parts):
            _check_columns(config, file, columns_of(file))


def _check_random_tokens(config: DataConfig, where: str) -> None:
    if config.documents is None:
        raise UserError("source 'random-tokens' needs `documents`", where=f"{where}.documents", allowed="a number")
    if config.transfer is not None:
        raise UserError("its tokens are sampled already", where=f"{where}.transfer", todo="drop transfer")
    if config.validation_share:
        raise UserError(
            "made-up tokens are nothing to validate on", where=f"{where}.validation_share", todo="drop validation_share"
        )
    if config.task == "classify" and not config.labels:
        raise UserError(
            "made-up texts have no labels to find the classes in", where=f"{where}.labels", todo="name them in order"
        )


def _read_columns(config: DataConfig) -> tuple[str, ...]:
    """The columns of a source that a task reads."""
    pair = (config.text_pair,) if config.text_pair else ()
    return (*config.text_columns, *pair, *filter(None, (config.name, config.domain)))


def _check_columns(config: DataConfig, file: DataFile, columns: list[str] | None) -> None:
    for name in _read_columns(config):
        if columns is not None and name not in columns:
            hint = missing_column_hint(config, file, columns)
            todo = hint if "separat" in hint else nearest_column(name, columns) or hint
            raise DataError(f"no column '{name}'", where=file.name, allowed=columns, todo=todo)


def _stdlib_source(config: DataConfig, base: Path) -> Raw:
    """Prose and code of this Python installation itself, split by module."""
    documents = stdlib_documents(tuple(d for d in DOMAINS if d in (config.domains or DOMAINS)))
    return _python_raw(config.source, "the Python library's own text", documents, ("text", "domain", "name"))


def _docstrings_source(config: DataConfig, base: Path) -> Raw:
    """Docstrings of the packages that mtkd needs, to classify by package; split by module."""
    every = docstring_rows()
    rows = [row for row in every if row.domain in (config.domains or SUBJECTS)]
    # Declared, so that the classes are all of them where `domains` leaves some out
    classes = sorted({row.label for row in every})
    columns = ("text", "label", "domain", "name")
    return _python_raw(config.source, "docstrings of installed packages", rows, columns, classes)


def _python_raw(
    source: str,
    what: str,
    documents: Sequence[Document | Docstring],
    columns: tuple[str, ...],
    classes: Sequence[str] = (),
) -> Raw:
    from datasets import ClassLabel, Dataset, Features, Value

    digest = hashlib.sha256()
    for document in documents:
        parts = [getattr(document, key) for key in ("split", *columns[1:], "text")]
        digest.update("".join(f"{part}\0" for part in parts).encode())
    types = Features({key: ClassLabel(names=classes) if key == "label" else Value("string") for key in columns})
    splits = {
        split: Dataset.from_dict(
            {key: [getattr(d, key) for d in documents if d.split == split] for key in columns}, features=types
        )
        for split in SPLITS
    }
    size = sum(len(d.text) for d in documents) / 1e6
    description = f"{what}: {len(documents)} documents, {size:.1f} million characters"
    origins = {s: Origin(f"{source} {s}", np.arange(len(rows))) for s, rows in splits.items()}
    return Raw(splits, digest.hexdigest(), description, origins, names="name", domains="domain")


def _files_source(config: DataConfig, base: Path) -> Raw:
    """Local files and saved data sets; see `mtkd.data.files`."""
    files = find_files(config, base)
    named = (*_read_columns(config), config.teacher, *((config.label,) if has_labels(config) else ()))
    tables = {split: read_files(parts, named, config.messages or "") for split, parts in files.items()}
    description = ", ".join(f"{part.origin.name}: {len(part.rows)} rows" for part in tables.values())
    return Raw(
        {split: part.rows for split, part in tables.items()},
        file_digest(files),
        description,
        {split: part.origin for split, part in tables.items()},
        notes=tuple(note for part in tables.values() for note in part.notes),
    )


def _hub_source(config: DataConfig, base: Path) -> Raw:
    """A data set of the Hugging Face hub, through `datasets`: whole, or so many rows of a stream."""
    label = (config.label,) if has_labels(config) else ()
    return hub_rows(config, base, (*dict.fromkeys((*_read_columns(config), *label)), config.teacher))


def _mix_source(config: DataConfig, base: Path) -> Raw:
    """Rows of other data entries, by weight: mix: {NAME: weight}."""
    raws = {}
    for name, part in config.parts.items():
        try:
            raws[name] = choose_rows(read_source(part, base), part)
        except UserError as error:  # the caller would name the mix, which is not what is wrong
            if error.where.startswith("@data"):
                error.where = f"data.{name}{error.where.removeprefix('@data')}"
            else:
                error.used_by = error.used_by or f"data.{name}"
            raise
    return mixed_rows(config, raws)


def _stage_source(config: DataConfig, base: Path) -> Raw:
    """Texts that a `kind: generate` stage writes: stage: NAME."""
    part = config.answered[1]
    return stage_rows_of(config, choose_rows(read_source(part, base), part))


def _random_tokens_source(config: DataConfig, base: Path) -> Raw:
    """No data at all: a train split of texts whose every token is sampled from the vocabulary."""
    from datasets import Dataset

    assert config.documents is not None
    # Placeholders of the right length; `transfer_tokens` replaces every one of their tokens.
    text = " ".join(["a"] * max(config.max_length - 2, 1))
    columns = [c for c in (config.text, config.text_pair) if c]
    rows = Dataset.from_dict({column: [text] * config.documents for column in columns})
    digest = hashlib.sha256(f"random-tokens {config.documents} {config.max_length} {config.seed}".encode())
    origins = {"train": Origin("random tokens", np.arange(config.documents))}
    return Raw({"train": rows}, digest.hexdigest(), f"{config.documents} texts of random tokens", origins)


SOURCES.add("python-stdlib", _stdlib_source)
SOURCES.add("python-docstrings", _docstrings_source)
SOURCES.add("files", _files_source)
SOURCES.add("hub", _hub_source)
SOURCES.add(MIX, _mix_source)
SOURCES.add(STAGE, _stage_source)
SOURCES.add(RANDOM_TOKENS, _random_tokens_source)
