"""YAML text to plain values that know their line. What YAML can be abused for is refused before a value is built.

PyYAML reads the text into nodes. Lines and texts as written come from these, and python tags, alias bombs, cycles and
duplicate keys are refused there. ruamel.yaml was tried. It has the same nodes and takes 1.6 times the time. All of this
would stay ours, because its values do not keep the text of ``no`` or ``007`` (CONTRIBUTING.md).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from mtkd.errors import UserError, what_is

MAX_BYTES = 1_000_000
MAX_NODES = 100_000  # after expansion of aliases; a recipe has a few hundred

_TAG = "tag:yaml.org,2002:"
_MERGE = _TAG + "merge"
_TEXT_TAGS = {_TAG + "str", _TAG + "timestamp", _TAG + "value"}  # a date is text here: JSON has no dates
_PLAIN_TAGS = {_TAG + name for name in ("null", "bool", "int", "float")}


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 5e-4 as a number, as YAML 1.2 and JSON do."""


class _Dumper(yaml.SafeDumper):
    """Safe YAML that quotes the text 5e-4, which YAML 1.2 reads as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # Within single quotes YAML reads these line ends as others; within double ones they are escaped.
    style = '"' if re.search("[\r\n\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _text)
for _one in (_Loader, _Dumper):
    _one.add_implicit_resolver(_TAG + "float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789"))


@dataclass
class Value:
    """A value and the place it was written at; `value` is a scalar, a list or a dict of `Value`.

    `text` is what stands in the file where the value is a boolean, a number or nothing, such as ``no`` or ``007``.
    """

    value: Any
    place: str
    text: str = ""

    def plain(self) -> Any:
        """The same without places."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, list):
            return [child.plain() for child in self.value]
        return self.value


@dataclass(frozen=True)
class Written:
    """What a configuration was read from, for messages. It takes no part in comparisons of configurations."""

    root: Value | None = field(default=None, compare=False)


def read_text(file: Path) -> str:
    """The text of a file of at most `MAX_BYTES`."""
    if file.exists() and not file.is_file():
        raise UserError(f"the configuration cannot be read: it is {what_is(file)}", where=str(file), allowed="a file")
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"the configuration cannot be read: {error.strerror}", where=str(file)) from None
    if len(data) > MAX_BYTES:
        raise UserError("the configuration is too large", where=str(file), allowed=f"at most {MAX_BYTES:,} bytes")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the configuration is not UTF-8 text (byte {error.start})", where=str(file)) from None


def parse(text: str, origin: str, *, lines: bool = True) -> Value:
    """The one document in `text`, every value with its place: ``origin:line``, or `origin` alone for an override."""
    loader = None
    try:
        loader = _Loader(text)  # refuses control characters itself
        node = loader.get_single_node()
        if node is None:
            return Value(None, origin)
        builder = _Builder(loader, origin, lines)
        builder.count(node)
        return builder.build(node)
    except yaml.reader.ReaderError as error:
        raise UserError(f"not YAML: {error.reason} at position {error.position}", where=origin) from None
    except yaml.MarkedYAMLError as error:
        # Only the reason: PyYAML's own text quotes the line, which may hold a password.
        mark = error.problem_mark or error.context_mark
        where = f"{origin}:{mark.line + 1}" if mark and lines else origin
        raise UserError(f"not YAML: {' '.join(filter(None, (error.context, error.problem)))}", where=where) from None
    except RecursionError:
        raise UserError("nested too deeply", where=origin) from None
    finally:
        if loader is not None:
            loader.dispose()


def write(values: object) -> str:
    """Plain values as YAML text; text that YAML would take for something else is quoted, keys stay in order."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Builder:
    """Turns composed nodes into `Value`s, refusing what has no JSON counterpart."""

    def __init__(self, loader: _Loader, origin: str, lines: bool) -> None:
        self._loader, self._origin, self._lines = loader, origin, lines
        self._sizes: dict[int, int | None] = {}

    def count(self, node: yaml.Node) -> int:
        """Count the values in `node` with every alias expanded; refuse cycles and more than `MAX_NODES`."""
        if id(node) in self._sizes:
            size = self._sizes[id(node)]
            if size is None:
                raise UserError("an alias refers to the value it is part of", where=self._place(node))
            return size
        self._sizes[id(node)] = None
        total = 1
        if isinstance(node, yaml.SequenceNode):
            total += sum(self.count(child) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            total += sum(self.count(key) + self.count(value) for key, value in node.value)
        if total > MAX_NODES:
            raise UserError(
                "aliases expand to too many values", where=self._place(node), allowed=f"at most {MAX_NODES:,} values"
            )
        self._sizes[id(node)] = total
        return total

    def build(self, node: yaml.Node) -> Value:
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return Value(self._mapping(node), self._place(node))
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return Value([self.build(child) for child in node.value], self._place(node))
        if isinstance(node, yaml.ScalarNode) and node.tag in _TEXT_TAGS:
            return Value(self._text(node), self._place(node))
        if isinstance(node, yaml.ScalarNode) and node.tag in _PLAIN_TAGS:
            return Value(self._scalar(node), self._place(node), node.value)
        raise UserError(
            "a YAML tag that is not plain data",
            where=self._place(node),
            found=node.tag.replace(_TAG, "!!"),
            allowed="text, numbers, true, false, null, lists and mappings",
        )

    def _text(self, node: yaml.ScalarNode) -> str:
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise UserError("half a character: no file can hold it", where=self._place(node), found=ascii(node.value))
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        try:
            return self._loader.construct_object(node)
        except (ValueError, KeyError):
            if node.style is None and self._loader.resolve(yaml.ScalarNode, node.value, (True, False)) == node.tag:
                return node.value  # 0b_, or thousands of digits: looks like a number and is none
            # !!int "x", !!bool "x"
            raise UserError("not a value of its tag", where=self._place(node), found=node.value[:40]) from None

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Value]:
        merged: dict[str, Value] = {}
        own: dict[str, Value] = {}
        for key, value in node.value:
            if key.tag == _MERGE:
                for other in reversed(value.value if isinstance(value, yaml.SequenceNode) else [value]):
                    if not isinstance(other, yaml.MappingNode):
                        raise UserError("<<: merges mappings only", where=self._place(key))
                    merged.update(self._mapping(other))
                continue
            if not isinstance(key, yaml.ScalarNode) or (key.tag not in _TEXT_TAGS and key.tag not in _PLAIN_TAGS):
                raise UserError("a key must be plain text", where=self._place(key))
            name = self._text(key)  # the text as written: a stage may be called `on` or `7`
            if name in own:
                raise UserError(
                    f"key '{name}' is there twice", where=self._place(key), todo=f"the first is {own[name].place}"
                )
            # The place of a value is its key's line, which is where one looks for it.
            own[name] = replace(self.build(value), place=self._place(key))
        return {**merged, **own}

    def _place(self, node: yaml.Node) -> str:
        return f"{self._origin}:{node.start_mark.line + 1}" if self._lines else self._origin
