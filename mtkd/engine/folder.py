"""The folder of a run: its paths, its lock, its stages, and what it records of where it was made.

runs/<name>/run.yaml  env.json  metrics.jsonl  report.html  plots/  logs/rank-*.log  LOCK
runs/<name>/stages/01-<stage>/checkpoints/step-000500/  export/  scores.jsonl  DONE
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mtkd.config import RunConfig, check_name, yamlfile
from mtkd.engine.lock import held
from mtkd.engine.notes import Done, Environment, read_done
from mtkd.engine.record import FORMAT, plain_bytes, read_object, read_record, write_record
from mtkd.engine.seal import (
    write_atomic,
    write_sealed,
)
from mtkd.errors import DataError, UserError, without_secrets

PACKAGES = ("mtkd", "torch", "transformers", "deepspeed", "datasets", "tokenizers", "safetensors", "scipy", "pydantic")
_STAGE_FOLDER = re.compile(r"\d{2,}-(.+)")
SEAL_LINE = "# sha256 of the lines above: "
"""The last line of run.yaml begins so."""
_OFFLOADED = ".offload-"
BEFORE = ".before-"
"""What a stage made before it is redone lies next to it, under its name with this prefix."""
_ASIDE = re.compile(re.escape(BEFORE) + r"(\d{2,}-(.+))")


@dataclass(frozen=True)
class RunDir:
    """Paths of one run. Nothing is written by reading a property."""

    path: Path

    @classmethod
    def create(cls, config: RunConfig, *, base: Path) -> RunDir:
        """The run's folder below `base`, made when it is not there; an existing run is left as it is.

        Raises:
            UserError: when the folder cannot be written, or holds something that is not a run.
        """
        run = cls(base / config.name)
        _check_writable(run.path)
        if not run.config_file.exists():
            # of a start that was killed before the last line below
            own = (run.lock_file, run.environment_file, run.rank_log(0).parent)
            others = [p.name for p in run.path.iterdir() if p not in own and p.name[0] != "."]
            if others:
                raise UserError(
                    "the folder exists and is not a run",
                    where=str(run.path),
                    found=sorted(others)[:5],
                    todo="rename the run",
                )
            run.write_environment(sys.argv)
            run.write_config(config)  # last: a folder with run.yaml is a run
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunDir:
        """An existing run.

        Raises:
            UserError: `path` is none. DataError: its run.yaml is no plain file.
        """
        run = cls(Path(path))
        if not run.config_file.exists():
            raise UserError("not the folder of a run: it has no run.yaml", where=str(path))
        if not run.config_file.is_file():
            todo = "remove it; `mtkd run FILE` writes it again"
            raise DataError("not a plain file", where=str(run.config_file), todo=todo)
        return run

    @property
    def config_file(self) -> Path:
        """The configuration as given, overrides applied."""
        return self.path / "run.yaml"

    @property
    def environment_file(self) -> Path:
        """Versions and platform."""
        return self.path / "env.json"

    @property
    def metrics_file(self) -> Path:
        """One JSON line per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        """The report page."""
        return self.path / "report.html"

    @property
    def plots(self) -> Path:
        """Folder of the report's pictures."""
        return self.path / "plots"

    @property
    def lock_file(self) -> Path:
        """Who is working in the folder; empty when no process is."""
        return self.path / "LOCK"

    def rank_log(self, rank: int) -> Path:
        """The log of one process; its folder is made by who writes it."""
        return self.path / "logs" / f"rank-{rank}.log"

    def offload_file(self, teacher: str) -> Path:
        """Where an offloaded teacher's weights are written, until every process has them open."""
        return self.path / f"{_OFFLOADED}{teacher}"

    def stage(self, index: int, name: str) -> StageDir:
        """The folder of a stage: the one under this name, with any number; else a new one's.

        Args:
            index: number of a new folder, counted from 1. It is for readers: a stage that was inserted or moved must
                not make another one lose its folder.

        Raises:
            DataError: there are two.
        """
        parent = self.path / "stages"
        folders = self.stage_folders().get(check_name(name), [])
        if len(folders) > 1:
            raise DataError(
                "a stage has two folders",
                where=str(parent),
                found=", ".join(sorted(path.name for path in folders)),
                todo="remove the one that is not wanted",
            )
        return StageDir(folders[0] if folders else parent / f"{index:02d}-{name}")

    def stage_folders(self) -> dict[str, list[Path]]:
        """Folders by the name of their stage."""
        parent, folders = self.path / "stages", dict[str, list[Path]]()
        for path in parent.iterdir() if parent.is_dir() else ():
            if match := _STAGE_FOLDER.fullmatch(path.name):
                folders.setdefault(match[1], []).append(path)
        return folders

    def set_aside(self) -> dict[str, Path]:
        """Stages whose earlier work is kept aside while they are redone -> its folder; see `mtkd.running.redo`."""
        parent, folders = self.path / "stages", dict[str, Path]()
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            if (match := _ASIDE.fullmatch(path.name)) and path.is_dir():
                folders[match[2]] = path
        return folders

    def sweep_offloaded(self) -> None:
        """Remove files of offloaded weights that a killed process left; under the lock."""
        for left in self.path.glob(f"{_OFFLOADED}*"):
            left.unlink()

    def write_config(self, config: RunConfig) -> None:
        """Write run.yaml so that `load_config` reads an equal configuration from it."""
        # Only what was set: some checks ask whether a key was written at all.
        values = config.model_dump(mode="json", exclude_unset=True)
        text = yamlfile.write(values)
        write_atomic(self.config_file, f"{text}{SEAL_LINE}{hashlib.sha256(text.encode()).hexdigest()}\n")

    def config_is_whole(self, must: bool = False) -> bool:
        """Whether the last line of run.yaml has the digest of the others.

        Args:
            must: a file without a digest is damaged; else it is so where env.json is of a version that wrote one.
        """
        text, mark, digest = plain_bytes(self.config_file).rpartition(SEAL_LINE.encode())
        if not mark:
            return not must and not self._of_a_version_that_seals()
        return hashlib.sha256(text).hexdigest().encode() == digest.strip()

    def _of_a_version_that_seals(self) -> bool:
        try:
            return read_object(self.environment_file).get("format") == FORMAT
        except (FileNotFoundError, DataError):
            return False

    def write_environment(self, argv: Sequence[str]) -> None:
        """Write env.json."""
        write_record(self.environment_file, environment(argv))

    def environment(self) -> dict[str, Any]:
        """What env.json holds.

        Raises:
            DataError: it is missing or damaged.
        """
        todo = "`mtkd run FILE` writes it again"
        try:
            return read_record(self.environment_file, Environment, todo)
        except FileNotFoundError:
            raise DataError("the file is missing", where=str(self.environment_file), todo=todo) from None

    def lock(self) -> AbstractContextManager[None]:
        """Hold the run for this process; see `mtkd.engine.lock`."""
        return held(self.lock_file)


@dataclass(frozen=True)
class StageDir:
    """Paths of one stage of a run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of ``step-000500`` folders; see `save_sealed` and `newest_sealed`."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The trained model, loadable with ``from_pretrained``."""
        return self.path / "export"

    @property
    def partial(self) -> Path:
        """Caches that are being written; moved to `export` when they are whole."""
        return self.path / "partial"

    @property
    def calibration_file(self) -> Path:
        """How its teachers were calibrated; written before it trains."""
        return self.path / "calibration.json"

    @property
    def agreement_file(self) -> Path:
        """How far its teachers agree, once that was measured."""
        return self.path / "agreement.json"

    @property
    def done_file(self) -> Path:
        """There when the stage is finished."""
        return self.path / "DONE"

    def done(self) -> Done | None:
        """What `mark_done` recorded; None when the stage is not finished.

        Raises:
            DataError: when the file is not what `mark_done` writes.
        """
        return read_done(self.done_file)

    def mark_done(self, record: Done) -> None:
        """Record the end of the stage. Atomic, and the last thing a stage writes."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_record(self.done_file, record.values())

    def sealed_export(self, write: Callable[[Path], None], facts: Mapping[str, Any]) -> Path:
        """Have the model written aside, seal it and put it in place; for the main rank. Replaces an earlier one."""
        write_sealed(self.export, write, facts)
        return self.export


def versions() -> dict[str, str]:
    """Installed versions of what the numbers depend on, without importing any of it."""
    numbers = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            numbers[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            numbers[package] = "not installed"
    return numbers


def environment(argv: Sequence[str]) -> dict[str, Any]:
    """Versions, platform and command line; no environment variables, no host name, no secrets."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "argv": without_secrets(argv),
    }


def _check_writable(folder: Path) -> None:
    """Make the folder and really write into it: permission bits do not tell (root, quotas, read-only mounts)."""
    probe = folder / f".tmp-probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(probe, "x")
        probe.unlink()
    except OSError as error:
        raise UserError(
            "the run's folder cannot be written",
            where=str(folder),
            found=error.strerror,
            todo="choose another `output`",
        ) from None
