"""From a YAML file and ``-o`` overrides to a checked `RunConfig`, with errors that name file, line, path and remedy.

No model or plug-in is touched: registered names are checked later, by the plan.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from mtkd.config import RunConfig
from mtkd.config.written import SHORT_FORMS, as_meant, is_block, keys_of, model_of, step_into, tagged
from mtkd.config.yamlfile import Value, Written, parse, read_text
from mtkd.errors import UserError, nearest

MAX_PROBLEMS = 8  # listed in one message
ABSENT = "(absent)"

Location = tuple[str | int, ...]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and validate a run's configuration.

    Args:
        path: the YAML file.
        overrides: ``dotted.path=value`` each, the value in YAML: ``stages.student.steps=200``,
            ``stages.student.teachers.0.name=prose``. Later ones win.
    Raises:
        UserError: listing every problem with file and line (or the override) it comes from.
    """
    file = Path(path)
    root = parse(read_text(file), str(file))
    if not isinstance(root.value, dict):
        raise UserError(
            "the configuration must be a mapping", where=root.place, found=root.value, allowed="name: ..., stages: ..."
        )
    for override in overrides:
        _override(root, override)
    try:
        config = RunConfig.model_validate(as_meant(root, RunConfig))
    except ValidationError as error:
        raise UserError(_explain(error, root)) from None
    config._base, config._written = file.resolve().parent, Written(root)
    return config


def fingerprint(value: object) -> str:
    """sha256 of the canonical JSON of `value` (sorted keys, no spaces, finite numbers), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def config_digest(config: BaseModel) -> str:
    """Fingerprint of a configuration; equal for equal meaning, with defaults written out or not."""
    values = config.model_dump(mode="json")
    # The order of stages has a meaning that canonical JSON would sort away.
    members = [list(stage.get("members") or ()) for stage in values.get("stages", {}).values()]
    return fingerprint([values, list(values.get("stages", ())), members])


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two nested mappings, one line per value: ``stages.student.steps: 100 -> 200``."""
    return [f"{where or '(all)'}: {_short(a)} -> {_short(b)}" for where, a, b in _changes(old, new, ())]


def _changes(old: Any, new: Any, where: Location) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _changes(old.get(key, _Absent), new.get(key, _Absent), (*where, key))
    elif isinstance(old, list | tuple) and isinstance(new, list | tuple):
        for i in range(max(len(old), len(new))):
            left, right = (side[i] if i < len(side) else _Absent for side in (old, new))
            yield from _changes(left, right, (*where, i))
    elif old != new:
        yield dotted(where), old, new


class _Absent:
    """Stands for a value that is not there; distinct from None, which can be written."""


def _override(root: Value, text: str) -> None:
    """Set one ``path=value`` in the tree, making the blocks on the way that the model knows."""
    path, equals, written = text.partition("=")
    origin = f"-o {path}"  # never with the value: it may be private
    if not equals or not path:
        raise UserError("an override is PATH=VALUE, e.g. stages.student.steps=200", where="-o", found=path)
    value = parse(written, origin, lines=False)
    here, annotation, rest = root, RunConfig, split_path(path)
    above: Location = ()
    while True:
        here.value = _opened(here, annotation)
        key, rest = _next_key(here, annotation, rest, (above, origin))
        if not rest:
            here.value[key] = value
            return
        here, annotation, above = here.value[key], step_into(annotation, key), (*above, key)


def split_path(path: str) -> list[str]:
    """``stages.student.match[2].loss`` or ``...match.2.loss`` in parts."""
    return re.sub(r"\[(\d+)\]", r".\1", path).split(".")


def _opened(here: Value, annotation: Any) -> Any:
    """The value; a string that stands for a block, or an empty block, becomes a mapping."""
    model = model_of(annotation)
    if model in SHORT_FORMS and here.value is not None and not isinstance(here.value, dict | list):
        return {SHORT_FORMS[model]: Value(here.value, here.place, here.text)}
    return {} if here.value is None and is_block(annotation) else here.value


def _next_key(here: Value, annotation: Any, rest: list[str], context: tuple[Location, str]) -> tuple[Any, list[str]]:
    """The key below `here` that the first parts of `rest` name, and the other parts. A name may contain dots."""
    above, origin = context
    if isinstance(here.value, list):
        if not rest[0].isdecimal() or int(rest[0]) >= len(here.value):
            numbers = f"0 to {len(here.value) - 1}" if here.value else "none: the list is empty"
            raise UserError(f"{dotted(above)} has no such entry", where=origin, found=rest[0], allowed=numbers)
        return int(rest[0]), rest[1:]
    if not isinstance(here.value, dict):
        raise UserError(
            f"nothing is below {dotted(above)}", where=origin, found=here.value, allowed="a path to a value"
        )
    for length in range(len(rest), 0, -1):
        if (key := ".".join(rest[:length])) in here.value:
            return key, rest[length:]
    if len(rest) > 1:
        if not is_block(step_into(annotation, rest[0])) or model_of(annotation) is None:
            known = keys_of(annotation) or list(here.value)
            raise UserError(
                f"{dotted((*above, rest[0]))} does not exist",
                where=origin,
                found=rest[0],
                allowed=known,
                todo=nearest(rest[0], known),
            )
        here.value[rest[0]] = Value({}, origin)
    return rest[0], rest[1:]


@dataclass
class _Problem:
    text: str
    found: str = ""
    allowed: str = ""
    todo: str = ""

    def line(self, place: str, path: str) -> str:
        parts = [
            self.text,
            self.found and f"found {self.found}",
            self.allowed and f"allowed: {self.allowed}",
            self.todo,
        ]
        path = "" if place == f"-o {path}" else path
        return ": ".join(filter(None, (place, path, "; ".join(filter(None, parts)))))


def _explain(error: ValidationError, root: Value) -> str:
    """Every problem on a line of its own: ``file.yaml:12: stages.student.stepz: unknown key; ...``."""
    problems: dict[tuple[str, str], list[_Problem]] = {}
    for detail in error.errors(include_url=False):
        location = tuple(part for part in detail["loc"] if part != "[key]")
        known, unknown, annotation = _known_part(location)
        if detail["type"] == "extra_forbidden":
            known = (*known, *unknown)
        problem = _problem(detail, known, annotation)
        place, path = written_at(root, known), dotted(known)
        if not known and (named := re.match(r"([\w.+\[\]-]+): ", problem.text)):
            # a reference, checked over the whole run, names its own path
            place = written_at(root, tuple(split_path(named[1])))
        problems.setdefault((place, path), []).append(problem)
    lines = []
    for (place, path), same in problems.items():
        # The members of a union complain one by one about the same value.
        texts, allowed = _either([p.text for p in same]), _either([p.allowed for p in same])
        lines.append(_Problem(texts, same[0].found, allowed, same[0].todo).line(place, path))
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"and {len(lines) - MAX_PROBLEMS} more problems"]
    return "\n".join(lines)


def _either(texts: list[str]) -> str:
    return " or ".join(dict.fromkeys(filter(None, texts)))


def _known_part(location: Location) -> tuple[Location, Location, Any]:
    """The part of pydantic's location that is a path, the rest (it adds union members), and the annotation there."""
    annotation: Any = RunConfig
    known: Location = ()
    for depth, part in enumerate(location):
        if part in (blocks := tagged(annotation)):  # of a teacher: its backend's block, whose keys follow
            annotation = blocks[str(part)]
            continue
        below = step_into(annotation, part)
        if below is None:
            return known, location[depth:], annotation
        known, annotation = (*known, part), below
    return known, (), annotation


def _problem(detail: Any, known: Location, annotation: Any) -> _Problem:
    kind, given = detail["type"], detail["input"]
    found = "" if isinstance(given, dict | BaseModel) else _short(given)
    if kind == "extra_forbidden":
        # The value is left out of the message: under a wrong key it may be a password.
        keys = keys_of(annotation)
        return _Problem("unknown key", repr(known[-1]), ", ".join(keys), nearest(str(known[-1]), keys))
    if kind == "missing":
        return _Problem("is missing")
    if kind == "literal_error":
        expected = detail["ctx"]["expected"]
        choices = re.findall(r"'([^']*)'", expected)
        return _Problem("not allowed", found, expected, nearest(given, choices) if isinstance(given, str) else "")
    if kind == "value_error":
        return _Problem(str(detail["ctx"]["error"]), found)
    return _Problem(detail["msg"].replace("Input should", "should"), found)


def written_at(root: Value, location: Location) -> str:
    """Where the deepest written value on the way to `location` stands, with the overrides below it."""
    here, rest = root, [str(part) for part in location]
    while rest and isinstance(here.value, dict | list):
        if isinstance(here.value, list):
            if not rest[0].isdecimal() or int(rest[0]) >= len(here.value):
                break
            here, rest = here.value[int(rest[0])], rest[1:]
            continue
        length = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in here.value), 0)
        if not length:
            break
        here, rest = here.value[".".join(rest[:length])], rest[length:]
    below = [] if here.place.startswith("-o ") else list(dict.fromkeys(_overrides(here)))
    return " with ".join([here.place, *(below if location else [])])


def _overrides(here: Value) -> Iterator[str]:
    if here.place.startswith("-o "):
        yield here.place
    children = here.value.values() if isinstance(here.value, dict) else here.value
    if isinstance(here.value, dict | list):
        for child in children:
            yield from _overrides(child)


def dotted(location: Location) -> str:
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            plain = re.fullmatch(r"[\w.+-]{1,100}", part)
            text += ("." if text else "") + (part if plain else _short(part))
    return text


def _short(value: Any) -> str:
    """`repr`, cut to a readable length."""
    if value is _Absent:
        return ABSENT
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}... ({len(text)} characters)"
