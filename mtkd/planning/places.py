"""Places in messages are those of the user's file: ``stages.student.teachers[0].model``, with file and line.

A function that reads one model or one `data` block does not know the place of that block. It raises with
``where="@model.slice.heads"`` or ``"@data.max_length"``, and its caller names the place::

    with placed(model="stages.student.student", data="data.text"):
        build_model(...)

The commands put `in_file` around everything. It turns places in a chain's stages into places of `chain`, and adds file
and line. A static test compares every literal place with the schema.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from mtkd.config import RunConfig
from mtkd.config.chain import ChainConfig
from mtkd.config.read import Location, dotted, split_path, written_at
from mtkd.config.written import step_into
from mtkd.config.yamlfile import Value
from mtkd.errors import UserError

_PLACE = re.compile(r"([a-z_]+)([.\[]|$)")


@contextmanager
def placed(**roles: str) -> Iterator[None]:
    """Move errors at ``@ROLE...`` to ``PLACE...``; an error at a place on disk also names the block that uses it.

    Args:
        roles: role of a block (model, data, stage, weighting, row) -> its place in the configuration.
    """
    try:
        yield
    except UserError as error:
        for role, place in roles.items():
            if re.match(rf"@{role}(?![\w-])", error.where):
                error.where = place + error.where[len(role) + 1 :]
                break
        else:
            if not error.used_by and error.where and not _is_place(error.where):
                error.used_by = next(iter(roles.values()))
        raise


def _is_place(where: str) -> bool:
    """Whether this is a place in a configuration, and not one on disk or an option of a command."""
    match = _PLACE.match(where)
    return where.startswith("@") or (match is not None and match[1] in RunConfig.model_fields)


@contextmanager
def in_file(config: RunConfig) -> Iterator[None]:
    """Make errors at a place of `config` name the place that the user wrote, with file and line."""
    try:
        yield
    except UserError as error:
        if (root := config._written.root) is not None and not error.line:
            error.where, error.line = _in_file(error.where, config, root)
            error.used_by = ": ".join(filter(None, reversed(_in_file(error.used_by, config, root))))
        raise


def _in_file(where: str, config: RunConfig, root: Value) -> tuple[str, str]:
    """(place, file:line) of a place of the configuration; other places stay, without a line."""
    if not _is_place(where):
        return where, ""
    parts = _of_chain(_joined(split_path(where), config), config)
    if not _is_there(parts, config):
        return where, ""
    written = _until_scalar(parts, root)
    return dotted(written), written_at(root, written) if str(written[0]) in root.value else ""


def _joined(parts: list[str], config: RunConfig) -> Location:
    """The parts of a path; a name with dots, of a stage or data entry, stays one part.

    Other names need no such care: they are looked up in the written file.
    """
    names = _names(config, parts[0])
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[1 : 1 + length])
        if name in names:
            return (parts[0], name, *map(_number, parts[1 + length :]))
    return (parts[0], *map(_number, parts[1:]))


def _names(config: RunConfig, first: str) -> list[str]:
    """The names that users gave to the parts of `first`."""
    stages = config.chain.names if config.chain else []
    return {"stages": [*config.stages, *stages], "data": [*config.data]}.get(first, [])


def _number(part: str) -> str | int:
    return int(part) if part.isdecimal() else part


def _is_there(parts: Location, config: RunConfig) -> bool:
    """Whether the run has this stage or data entry, or the schema this key: data.jsonl and tokenizer.json are files."""
    first, second = str(parts[0]), parts[1] if len(parts) > 1 else None
    if second is None:
        return True
    names = _names(config, first)
    return second in names if names else step_into(step_into(RunConfig, first), second) is not None


def _until_scalar(parts: Location, root: Value) -> Location:
    """The part of a place that a file can have: a plain value in place of a block has nothing below it."""
    here: Value | None = root
    for depth, part in enumerate(parts):
        if here is not None and not isinstance(here.value, dict | list):
            return parts[:depth] if here.value is not None else parts
        if here is not None:
            here = _below(here, part)
    return parts


def _below(here: Value, part: str | int) -> Value | None:
    if isinstance(here.value, list):
        return here.value[part] if isinstance(part, int) and part < len(here.value) else None
    return here.value.get(str(part)) if isinstance(here.value, dict) else None


def _of_chain(parts: Location, config: RunConfig) -> Location:
    """The place in `chain` that determines a place in one of its stages."""
    chain, root = config.chain, config._written.root
    if chain is None or root is None or len(parts) < 2 or parts[0] != "stages" or parts[1] not in chain.names:
        return parts
    stages = root.value.get("stages")
    if stages is not None and _below(stages, parts[1]) is not None:  # the run folder's copy has both
        return parts
    name, rest = str(parts[1]), parts[2:]
    if not rest:
        return ("chain",)
    if rest[0] == "student":
        return (*_model_of(chain, name, root), *rest[1:])
    if rest[0] == "teachers" and len(rest) > 1 and isinstance(rest[1], int):
        return _teacher_of(chain, name, rest[1], rest[2:], root)
    owners = (("chain", "overrides", name), ("chain", "overrides", chain.student_name), ("chain",))
    for owner in owners if name == chain.direct_name else (owners[0], owners[2]):
        if _written(root, (*owner, rest[0])) is not None:
            return (*owner, *rest)
    return ("chain",)


def _model_of(chain: ChainConfig, name: str, root: Value) -> Location:
    """The place in `chain` that describes the model of a stage."""
    if _written(root, ("chain", "models", name)) is not None:
        return ("chain", "models", name)
    if name not in chain.assistants:
        return ("chain", "student")
    return ("chain", "rungs", chain.assistants.index(name)) if chain.rungs else ("chain", "num_rungs")


def _teacher_of(chain: ChainConfig, name: str, number: int, rest: Location, root: Value) -> Location:
    """The place in `chain` of teacher `number` of a stage: a teacher at the top, or an assistant."""
    above = chain.assistants if name == chain.student_name else []
    if name in chain.assistants:
        above = chain.assistants[: chain.assistants.index(name)]
    if chain.mode == "takd" and above:
        return _model_of(chain, above[-1], root)
    tops = len(chain.teachers)
    return ("chain", "teachers", number, *rest) if number < tops else _model_of(chain, above[number - tops], root)


def _written(root: Value, parts: Location) -> Value | None:
    here: Value | None = root
    for part in parts:
        here = None if here is None else _below(here, part)
    return here
