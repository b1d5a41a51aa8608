"""Keep the run's own copy of its configuration: `run` writes it, `resume` reads it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from mtkd.config import RunConfig
from mtkd.config.read import config_digest
from mtkd.data.progress import say
from mtkd.engine.folder import RunDir, environment
from mtkd.engine.record import write_record
from mtkd.engine.runyaml import own_config
from mtkd.engine.seal import newest_sealed
from mtkd.errors import DataError, UserError
from mtkd.running.agreement import new_run_id

_BASE, _RUN_ID, _STREAMS = "configuration_folder", "run_id", "streams"


def reopen(path: Path) -> RunConfig:
    """The configuration of an existing run, for `mtkd resume`.

    Raises:
        UserError: not a run folder.
        DataError: nothing in it can be resumed.
    """
    path = path.resolve()
    folder = RunDir.open(path)
    if not folder.environment_file.exists():  # any folder may hold a user's own run.yaml
        raise UserError("not the folder of a run: it has no env.json", where=str(path))
    config = own_config(folder).model_copy(update={"output": str(path.parent)})
    config._base = Path(folder.environment().get(_BASE) or Path.cwd())
    stages = [folder.stage(i, name) for i, name in enumerate(config.stages, 1)]
    if not any(s.done() or newest_sealed(s.checkpoints).path or s.partial.is_dir() for s in stages):
        raise DataError(
            "nothing to resume: no stage is finished and no checkpoint is whole",
            where=str(path),
            todo="start it again with `mtkd run FILE`",
        )
    return config


def remember(config: RunConfig, folder: RunDir, streams: Mapping[str, Mapping[str, str]]) -> str:
    """Bring run.yaml and the folder of its relative paths up to date, and write damaged files again.

    Args:
        streams: commits of the data sets that the run streams, see `mtkd.planning.streams.commits`.
    Returns:
        The run's id, from its first start by the clock of this, the main rank.
    """
    try:
        same = config_digest(own_config(folder)) == config_digest(config)
    except UserError as error:
        say(f"written again: {error.where}: {error.message}")
        same = False
    if not same or not folder.config_is_whole(must=True):
        folder.write_config(config)  # safe: every finished stage is compared with the new configuration
    try:
        facts = folder.environment()
    except DataError as error:
        say(f"written again: {error.where}: {error.message}")
        facts = environment(sys.argv)
    run_id = str(facts.get(_RUN_ID) or new_run_id())
    here = {_BASE: str(config.base.resolve()), _RUN_ID: run_id}
    pins = {**(facts.get(_STREAMS) or {}), **streams}
    write_record(folder.environment_file, {**facts, **here, **({_STREAMS: pins} if pins else {})})
    return run_id
