"""The run's own copy of its configuration, run.yaml: read only as the run wrote it."""

from __future__ import annotations

from mtkd.config import RunConfig
from mtkd.config.read import load_config
from mtkd.engine.folder import RunDir
from mtkd.errors import DataError


def own_config(folder: RunDir) -> RunConfig:
    """The configuration in run.yaml, which is as the run wrote it.

    Raises:
        UserError: it is not valid. DataError: it is damaged, or was changed by hand.
    """
    file, todo = folder.config_file, "`mtkd run FILE` writes it again; a changed configuration is a FILE of its own"
    if not folder.config_is_whole():
        raise DataError(
            "the run's copy of its configuration is damaged, or was changed: its digest differs (sha256)",
            where=str(file),
            todo=todo,
        )
    return load_config(file)
