"""The dependencies of a plug-in: modules that it imports, files and environment variables that it reads.

A stage that uses the plug-in is another stage when one of them changes. They are read off the sources:
- modules of the user's own, imported in any way; not those of Python, of mtkd, of installed packages;
- files that a constant names, from the plug-in's folder or the working directory, unless the program writes them;
- environment variables that are read by a constant name, unless they describe a machine or a process.
A name that a program puts together while it runs is not seen.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})

# Variables of machines, launchers and processes: other values of them make the same stage.
_PLACES = ("SLURM_", "OMPI_", "PBS_", "LSB_", "MASTER_", "OMP_", "MKL_", "XDG_", "HF_", "PYTHON", "MTKD_", "CUDA_",
           "NCCL_", "WANDB_")  # fmt: skip
_PLACE = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "NODE_RANK", "HOME", "USER", "PATH", "PWD", "TMPDIR",
          "TMP", "TEMP", "HOSTNAME", "LOGNAME", "SHELL", "LANG", "TERM"}  # fmt: skip
_WRITES = {"write_text", "write_bytes", "touch", "unlink", "remove", "FileHandler", "save", "savez", "savefig",
           "save_file", "to_csv", "to_json", "to_parquet"}  # fmt: skip


@dataclass
class _Dependencies:
    """The dependencies of a plug-in, as digests by name.

    Attributes:
        plugin: its file.
        own: a folder whose modules count even in an installed package; None for none.
        seen: files that were looked into.
    """

    plugin: Path
    own: Path | None
    digests: dict[str, str] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)


def depends_on(plugin: Path, own: Path | None = None, package: str = "") -> dict[str, str]:
    """sha256 (hexadecimal) by name: "imports pkg.part", "reads table.json", "reads $NAME"; {} for most plug-ins.

    Values of variables are never stored in the clear. An empty file does not count: it may be a passing flag.

    Args:
        own: folder of an installed plug-in's package, whose modules count.
        package: the package that the plug-in is in.
    """
    importlib.invalidate_caches()
    parts = _Dependencies(plugin, own, seen={plugin.resolve()})
    _look_into(plugin, package, parts)
    return dict(sorted(parts.digests.items()))


def _look_into(file: Path, package: str, parts: _Dependencies) -> None:
    """Add what one file of the plug-in depends on.

    Args:
        package: of the module in this file, for relative imports; "" for none.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):  # a file that is read and is no program, or is of another Python
        return
    for name in _imports(tree, package):
        _follow(name, file, parts)
    written = _written(tree)
    for node in ast.walk(tree):
        variable = _variable(node)
        if variable and variable not in _PLACE and not variable.startswith(_PLACES):
            value = repr(os.environ.get(variable)).encode()
            parts.digests[f"reads ${variable}"] = hashlib.sha256(value).hexdigest()
        elif isinstance(node, ast.expr):
            name = "/".join(_parts(node))
            path = None if name in written else _file(name, file, parts)
            if path is not None:
                _add(f"reads {name}", path, "", parts)


def _imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Full names of the modules that are imported, and of what could be a module in them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute("." * node.level + (node.module or ""), package)
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__") and node.args:
            yield from (_absolute(name, package) for name in _parts(node.args[0]))


def _absolute(name: str, package: str) -> str:
    level = len(name) - len(name.lstrip("."))
    above = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
    return ".".join(filter(None, [*above, name.lstrip(".")]))


def _follow(name: str, importer: Path, parts: _Dependencies) -> None:
    """Add the modules on the way to a name that are files of the user's own."""
    folders: list[str] | None = [*sys.path, str(parts.plugin.parent), str(importer.parent)]
    names = name.split(".")
    for i in range(len(names)):
        here = ".".join(names[: i + 1])
        spec = _spec(here, folders)
        if names[0] == "mtkd" or spec is None:
            return
        origin = Path(spec.origin) if spec.has_location and spec.origin else None
        if origin is not None and not _is_own(origin, parts):
            return
        if origin is not None and origin.is_file():
            _add(f"imports {here}", origin, here if spec.submodule_search_locations else ".".join(names[:i]), parts)
        folders = list(spec.submodule_search_locations or [])


def _spec(name: str, folders: list[str] | None) -> ModuleSpec | None:
    """Where a module is, as it was imported or would be; nothing is run."""
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__spec__ is not None:
        return loaded.__spec__
    try:
        return PathFinder.find_spec(name, folders)
    except (ImportError, ValueError):
        return None


def _is_own(file: Path, parts: _Dependencies) -> bool:
    both = (file, file.resolve())  # some installers link to a store of files
    if parts.own is not None and both[1].is_relative_to(parts.own.resolve()):
        return True
    return not any(_INSTALLED & set(f.parts) or any(f.is_relative_to(s) for s in _STANDARD) for f in both)


def _add(name: str, file: Path, package: str, parts: _Dependencies) -> None:
    """Add a file, and what it depends on where it is a program; each file once."""
    if file.resolve() in parts.seen:
        return
    parts.seen.add(file.resolve())
    parts.digests[name] = _digest(file)
    if file.suffix == ".py":
        _look_into(file, package, parts)


def _file(name: str, program: Path, parts: _Dependencies) -> Path | None:
    """The file that a constant names, from the program's folder, the plug-in's, or where the run was started."""
    if not name or len(name) > 500 or "\n" in name or "\0" in name:
        return None
    folders = (program.parent, parts.plugin.parent, Path.cwd())
    return next((folder / name for folder in folders if _is_content(folder / name)), None)


def _is_content(path: Path) -> bool:
    try:
        return path.is_file() and path.stat().st_size > 0 and not str(path.resolve()).startswith(("/proc/", "/sys/"))
    except OSError:  # a name that is too long, a folder that may not be read
        return False


def _parts(node: ast.AST) -> list[str]:
    """The constants of `folder / "a" / "b"`, `join(folder, "a", "b")`, `Path("a").with_name("b")`, in order."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else []
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        return _parts(node.left) + _parts(node.right)
    if isinstance(node, ast.Attribute):
        return _parts(node.value)
    if isinstance(node, ast.Call):
        called = [node.func] if isinstance(node.func, ast.Attribute) else []
        return [part for each in (*called, *node.args) for part in _parts(each)]
    return []


def _written(tree: ast.Module) -> set[str]:
    """Names of the files that the program itself writes: a log, or what it keeps for its next run, is a result."""
    nodes = list(ast.walk(tree))
    assigned = {ast.unparse(node.targets[0]): node.value for node in nodes if isinstance(node, ast.Assign)}
    names = {""}
    for call in nodes:
        if isinstance(call, ast.Call) and (_called(call) in _WRITES or _opens_to_write(call)):
            method = [call.func.value] if isinstance(call.func, ast.Attribute) else []
            for node in (*method, *call.args):
                names.add("/".join(_parts(assigned.get(ast.unparse(node), node))))
    return names


def _opens_to_write(call: ast.Call) -> bool:
    modes = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    texts = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return _called(call) == "open" and any(text.strip("bt+") in ("w", "a", "x") for text in texts)


def _called(call: ast.Call) -> str:
    """The last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _variable(node: ast.AST) -> str:
    """The name in `environ["NAME"]`, `environ.get("NAME")` and `getenv("NAME")`; "" for anything else."""
    name: ast.AST | None = None
    if isinstance(node, ast.Subscript) and _is_environment(node.value) and isinstance(node.ctx, ast.Load):
        name = node.slice
    elif isinstance(node, ast.Call) and node.args:
        read = isinstance(node.func, ast.Attribute) and node.func.attr == "get" and _is_environment(node.func.value)
        name = node.args[0] if read or _called(node) == "getenv" else None
    return name.value if isinstance(name, ast.Constant) and isinstance(name.value, str) else ""


def _is_environment(node: ast.AST) -> bool:
    return "environ" in (getattr(node, "attr", ""), getattr(node, "id", ""))


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
