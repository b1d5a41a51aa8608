"""The registries of losses, weightings, methods, tasks and data sources, and how plug-ins add to them.

Nothing heavy is imported here. Built-ins register when a registry is first read, plug-ins when a run names them
(``plugins: [path/to/file.py]``) or when their package declares the entry-point group ``mtkd.plugins``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from mtkd.config.plugincode import depends_on
from mtkd.errors import UserError, nearest

Value = TypeVar("Value")

BUILT_IN = "mtkd"
ENTRY_POINT_GROUP = "mtkd.plugins"

# Where the names registered just now come from; `load_plugins` sets it while it imports a plug-in.
_origin = BUILT_IN

_ALL: list[Registry[Any]] = []
_BUILT_IN_MODULES = (
    *("mtkd.losses", "mtkd.weightings", "mtkd.methods.papers", "mtkd.data.sources", "mtkd.data.tasks"),
    "mtkd.pool.backends",
)


class Registry(Mapping[str, Value], Generic[Value]):
    """Names to values of one kind. Reading it imports the module that holds the built-ins."""

    def __init__(self, kind: str, module: str) -> None:
        self.kind = kind
        self._module = module
        self._values: dict[str, Value] = {}
        self._origins: dict[str, str] = {}
        _ALL.append(self)

    def add(self, name: str, value: Value) -> None:
        """Register `value`; raises UserError when another origin has the name."""
        if _origin != BUILT_IN:
            self._load()  # so that a plug-in is compared with every built-in, imported or not
        owner = self._origins.get(name)
        if owner is not None:
            raise UserError(
                f"{self.kind} '{name}' is already registered by {owner}",
                where=f"plug-in {_origin}",
                todo="choose another name; a plug-in cannot replace an existing one",
            )
        self._values[name] = value
        self._origins[name] = _origin

    def find(self, name: str, where: str = "") -> Value:
        """The value of `name`; raises UserError with the nearest known name."""
        self._load()
        if name not in self._values:
            raise UserError(
                f"unknown {self.kind}",
                where=where,
                found=name,
                allowed=sorted(self._values),
                todo=nearest(name, self._values),
            )
        return self._values[name]

    def origin(self, name: str) -> str:
        """`mtkd` for a built-in, else the plug-in's file or package."""
        self._load()
        return self._origins[name]

    def forget(self, origin: str) -> None:
        """Drop everything registered by `origin` (a plug-in whose import failed half-way)."""
        for name in [n for n, o in self._origins.items() if o == origin]:
            del self._values[name], self._origins[name]

    def _load(self) -> None:
        if self._module not in sys.modules:
            global _origin
            before, _origin = _origin, BUILT_IN
            try:
                importlib.import_module(self._module)
            finally:
                _origin = before

    def __getitem__(self, name: str) -> Value:
        self._load()
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._values))

    def __len__(self) -> int:
        self._load()
        return len(self._values)


SOURCES: Registry[Callable[..., Any]] = Registry("data source", "mtkd.data.sources")
TASKS: Registry[Any] = Registry("task", "mtkd.data.tasks")

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
"""What a decorator registers and gives back."""


_loaded_plugins: dict[str, str] = {}  # file or entry point -> the origin its names are registered under
_code: dict[str, dict[str, str]] = {}  # file or entry point -> digests of what was imported, its own under ""
_everywhere: set[str] = set()  # origins of what works without being named in a configuration, such as a trait


def load_plugins(paths: tuple[str, ...] = (), base: Path | None = None) -> None:
    """Import plug-in files (relative to `base`) and installed plug-in packages, once each.

    Raises:
        UserError: when a file is missing, fails to import, registers a name that exists, or has changed since this
            process imported it.
    """
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        _import_plugin(entry.name, entry.load)
        if isinstance(entry, EntryPoint):
            _remember(f"entry point {entry.name}", entry.name, *_files_of(entry))
    for path in paths:
        file = (base or Path.cwd()) / path
        if file.suffix != ".py" or not file.is_file():
            raise UserError("a plug-in must be an existing .py file", where="plugins", found=str(path))
        key = str(file.resolve())
        _import_plugin(str(path), partial(_import_file, file.resolve()), key=key)
        _remember(key, str(path), file)


def plugin_origin(file: Path) -> str:
    """The origin under which a loaded plug-in file registered its names."""
    return _loaded_plugins[str(file.resolve())]


def plugin_code(files: Mapping[str, Path], origins: Collection[str]) -> dict[str, str]:
    """What the plug-ins behind names depend on, as this process imported it: sha256 (hexadecimal) by name.

    Args:
        files: of the run: as the configuration names it -> where it is.
        origins: of the names that are used. Files with traits, and files that register nothing, count as used;
            installed packages with traits where a plug-in is used, for mtkd's own weightings read mtkd's own traits.
    """
    readers = _everywhere if set(origins) - {BUILT_IN} else set()
    used = {f"entry point {origin}": origin for origin in {*origins, *readers}}
    used |= {
        str(file.resolve()): name for name, file in files.items() if plugin_origin(file) in {*origins, *_everywhere}
    }
    parts = [(shown, part, digest) for key, shown in used.items() for part, digest in _code.get(key, {}).items()]
    return {f"{shown} {part}".strip(): digest for shown, part, digest in parts}


def note_everywhere() -> None:
    """Count the plug-in that is being imported as used by every stage of its run."""
    if _origin != BUILT_IN:
        _everywhere.add(_origin)


def loaded_files() -> frozenset[str]:
    """The plug-in files that were imported, as frames of a traceback name them."""
    return frozenset(key for key in _loaded_plugins if key.endswith(".py"))


def as_text(error: BaseException) -> str:
    """An exception of a plug-in in words."""
    if isinstance(error, SystemExit):
        return f"it ended the process: sys.exit({'' if error.code is None else repr(error.code)})"
    return f"{type(error).__name__}: {error}"


def _remember(key: str, origin: str, file: Path | None, own: Path | None = None, package: str = "") -> None:
    """Store the digests of a plug-in that was just imported; refuse one that has changed since.

    A process keeps the code it imported. A stage made with the old code must not carry the digest of the new file.
    """
    if file is None:
        return
    now = {"": hashlib.sha256(file.read_bytes()).hexdigest(), **depends_on(file, own, package)}
    if key == str(file.resolve()) and not any(origin in registry._origins.values() for registry in _ALL):
        _everywhere.add(origin)
    before = _code.setdefault(key, now)
    if changed := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        raise UserError(
            "the plug-in, or what it depends on, changed after this process had imported it",
            where=f"plugins: {origin}",
            found=", ".join(name or "its file" for name in changed),
            todo="start Python again",
        )


def _files_of(entry: EntryPoint) -> tuple[Path | None, Path | None, str]:
    """The module of an installed plug-in, the folder of its outermost package, and the package that it lies in."""
    module, top = (sys.modules.get(name) for name in (entry.module, entry.module.partition(".")[0]))
    if module is None or module.__file__ is None:
        return None, None, ""
    outermost = Path(top.__file__) if top is not None and top.__file__ else None
    own = outermost.parent if outermost is not None and outermost.name == "__init__.py" else None
    return Path(module.__file__), own, module.__package__ or ""


def _import_file(file: Path) -> None:
    name = f"mtkd_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def _import_plugin(origin: str, load: Callable[[], object], key: str = "") -> None:
    global _origin
    key = key or f"entry point {origin}"
    if key in _loaded_plugins:
        return
    for module in _BUILT_IN_MODULES:  # a plug-in's own import of one must not make that module's names the plug-in's
        importlib.import_module(module)
    _origin = origin
    try:
        load()
        _loaded_plugins[key] = origin
        _code.pop(key, None)
    except (Exception, SystemExit) as error:
        for registry in _ALL:
            registry.forget(origin)
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"plug-in {origin} cannot be imported: {as_text(error)}",
            where="plugins",
            todo="put what a script does below `if __name__ == '__main__':`" if isinstance(error, SystemExit) else "",
        ) from error
    finally:
        _origin = BUILT_IN


def keyword_parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only parameters of a function, by name."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], where: str) -> None:
    """Refuse an unknown option, a missing one, and one whose type differs from its default's.

    Raises:
        UserError: naming the option, the allowed ones and the nearest of them.
    """
    for name, value in options.items():
        if name not in parameters:
            raise UserError(
                "unknown option",
                where=f"{where}.options",
                found=name,
                allowed=sorted(parameters) or "none",
                todo=nearest(name, parameters),
            )
        _check_numbers(value, f"{where}.options.{name}")
        default = parameters[name].default
        if default is inspect.Parameter.empty or default is None:
            continue
        accepted = (int, float) if isinstance(default, float) else type(default)
        swapped = isinstance(value, bool) != isinstance(default, bool)  # bool is an int in Python, not here
        if isinstance(default, tuple):
            accepted = (tuple, list)  # type: ignore[assignment]
        if swapped or not isinstance(value, accepted):
            raise UserError(
                "an option has the wrong type",
                where=f"{where}.options.{name}",
                found=value,
                allowed=f"a value like the default {default!r}",
            )
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise UserError("a required option is missing", where=f"{where}.options", found="nothing", allowed=name)


def _check_numbers(value: Any, where: str) -> None:
    """Refuse numbers, in lists and mappings too, that overflow where they are used, in any option."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_numbers(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for position, item in enumerate(value):
            _check_numbers(item, f"{where}[{position}]")
    elif isinstance(value, int | float):
        largest = 1e38 if isinstance(value, float) else 1_000_000_000
        if not abs(value) <= largest:  # true for NaN too
            raise UserError("a number out of range", where=where, found=value, allowed=f"-{largest:g} to {largest:g}")
