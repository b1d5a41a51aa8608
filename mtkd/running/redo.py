"""Redo stages (`--redo`): their former results stay until the new ones are done.

A stage's folder is renamed aside (``stages/.before-01-NAME``, with its lines of metrics.jsonl in it) and removed when
the new one is done. The next plain run finishes a killed redo. A redo that fails before it saves anything is undone:
the folders are renamed back. Results and report stay until there are new ones.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from mtkd.config import RunConfig
from mtkd.data.progress import say
from mtkd.engine.folder import BEFORE, RunDir, StageDir
from mtkd.engine.jsonlines import readable_jsonl, to_json
from mtkd.engine.record import Checked, read_record, write_atomic, write_record
from mtkd.engine.seal import fault_point, newest_sealed, sweep_left
from mtkd.errors import DataError, Preempted
from mtkd.planning.stages import needed_stages

_GOING = ".forgotten-"
_METRICS, _CURVES = "metrics.jsonl", "tensorboard"


class _Request(Checked):
    stages: list[str]


def pending(run: RunDir) -> list[str]:
    """The stages that a killed call was setting aside.

    Raises:
        DataError: its note is damaged.
    """
    file = _note(run)
    if not file.parent.is_dir():  # no run yet, or a file in its place, which is refused when the folder is made
        return []
    try:
        return list(read_record(file, _Request, "remove the file, and give --redo again", old=False)["stages"])
    except FileNotFoundError:
        return []


def set_aside(run: RunDir, names: Sequence[str]) -> None:
    """Rename the folders of these stages aside, and remove leftovers of a killed call; under the lock.

    A note of the stages is written first, so that the next call can finish this one after a kill.
    """
    parent = run.path / "stages"
    _sweep(run)
    drop_replaced(run)
    if names and parent.is_dir():
        write_record(_note(run), {"stages": list(names)})
        saved = parent / f"{BEFORE}run.yaml"
        if run.config_file.is_file() and not saved.exists():
            write_atomic(saved, run.config_file.read_bytes())
        lines, _ = readable_jsonl(run.metrics_file)
        for name in names:
            for path in run.stage_folders().get(name, []):
                _set_aside(run, name, path, [line for line in lines if line.get("stage") == name])
                fault_point("while-forgetting", 0)
        if run.metrics_file.exists():
            others = [line for line in lines if line.get("stage") not in names]
            write_atomic(run.metrics_file, "".join(to_json(line) + "\n" for line in others))
        _note(run).unlink()


@contextmanager
def undone_on_error(run: RunDir, config: RunConfig) -> Iterator[None]:
    """Put the stages back after an error, see `put_back`; after a signal or a kill the redo goes on."""
    try:
        yield
    except Preempted:
        raise
    except Exception:
        with suppress(OSError, DataError):  # the error that ended the run is the one to show
            if names := put_back(run, config):
                say(f"put back as they were before --redo: {', '.join(names)}")
            if left := sorted(run.set_aside()):
                say(f"kept until they are made again, in {run.path / 'stages'}/{BEFORE}*: {', '.join(left)}")
        raise


def put_back(run: RunDir, config: RunConfig) -> list[str]:
    """Undo `set_aside` for the stages that saved nothing new; under the lock.

    A stage stays aside when one that it needs was redone: its former teacher no longer exists.

    Returns:
        Their names.
    """
    old = run.set_aside()
    done: list[str] = []
    for name, stage in config.stages.items():
        if (
            name in old
            and not (set(needed_stages(stage, config.data_of(stage))) & old.keys()) - set(done)
            and not _has_new(run, name)
        ):
            _put_back(run, name, old[name])
            done.append(name)
    if old and not run.set_aside():
        saved = run.path / "stages" / f"{BEFORE}run.yaml"
        if saved.exists():
            saved.replace(run.config_file)
    return done


def drop_replaced(run: RunDir) -> None:
    """Remove the former folders of stages that are done again; under the lock."""
    for name, path in run.set_aside().items():
        with suppress(DataError):
            if any(StageDir(new).done() for new in run.stage_folders().get(name, [])):
                _remove(path)
    if not run.set_aside():
        (run.path / "stages" / f"{BEFORE}run.yaml").unlink(missing_ok=True)


def _note(run: RunDir) -> Path:
    return run.path / "stages" / ".redo"


def _set_aside(run: RunDir, name: str, path: Path, lines: list[dict[str, object]]) -> None:
    if name in run.set_aside():  # an earlier redo was not finished: drop what it had begun
        _remove(path)
        return
    write_atomic(path / _METRICS, "".join(to_json(line) + "\n" for line in lines))
    curves = run.path / _CURVES / name
    if curves.is_dir() and not (path / _CURVES).exists():
        curves.rename(path / _CURVES)
    path.rename(path.with_name(f"{BEFORE}{path.name}"))


def _put_back(run: RunDir, name: str, old: Path) -> None:
    for new in run.stage_folders().get(name, []):
        _remove(new)
    shutil.rmtree(run.path / _CURVES / name, ignore_errors=True)
    old_lines, _ = readable_jsonl(run.metrics_file)
    lines = [line for line in old_lines if line.get("stage") != name]
    if (old / _METRICS).exists():
        lines += readable_jsonl(old / _METRICS)[0]
        write_atomic(run.metrics_file, "".join(to_json(line) + "\n" for line in lines))
        (old / _METRICS).unlink()
    if (old / _CURVES).is_dir():
        (old / _CURVES).rename(run.path / _CURVES / name)
    old.rename(old.with_name(old.name.removeprefix(BEFORE)))


def _has_new(run: RunDir, name: str) -> bool:
    """Whether the stage saved anything since it was set aside."""
    folders = [StageDir(path) for path in run.stage_folders().get(name, [])]
    return any(f.done_file.exists() or f.partial.is_dir() or newest_sealed(f.checkpoints).path for f in folders)


def _sweep(run: RunDir) -> None:
    """Finish the removals of a killed call."""
    parent = run.path / "stages"
    run.sweep_offloaded()
    sweep_left(run.path)
    for path in parent.iterdir() if parent.is_dir() else ():
        if path.name.startswith(_GOING):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    """Rename and remove a folder: half of one must not look like a stage."""
    going = path.with_name(f"{_GOING}{path.name.lstrip('.')}-{os.getpid()}")
    path.rename(going)
    shutil.rmtree(going)
