"""The commit of each data set that a run streams: asked once, written into the run's record, the same ever after."""

from __future__ import annotations

from collections.abc import Mapping

from mtkd.config import RunConfig
from mtkd.config.mix import resolve_mixes
from mtkd.config.stagedata import resolve_stage_data
from mtkd.data.hub import commit_of
from mtkd.engine.folder import RunDir
from mtkd.errors import DataError
from mtkd.planning.places import placed


def pinned(config: RunConfig) -> RunConfig:
    """The run with a commit in the place of a branch or tag that it streams from."""
    return with_commits(config, commits(config))


def commits(config: RunConfig) -> dict[str, dict[str, str]]:
    """Per streamed `data` entry its path, revision as the user wrote it, and commit: the run's record's, or today's.

    Raises:
        DataError: no such data set or revision, or it is gated.
    """
    before = recorded(config)
    found = {}
    for name, data in config.data.items():
        if not data.stream or data.path is None:
            continue
        asked = {"path": data.path, "revision": data.revision or ""}
        known = before.get(name, {})
        if all(known.get(key) == value for key, value in asked.items()):
            found[name] = known
            continue
        with placed(data=f"data.{name}"):
            commit = commit_of(data, config.base)
        if commit is not None:
            found[name] = {**asked, "commit": commit}
    return found


def recorded(config: RunConfig) -> dict[str, dict[str, str]]:
    """What the run's record has; {} where there is none, or it cannot be read: the run writes it again."""
    try:
        return RunDir(config.folder).environment().get("streams") or {}
    except DataError:
        return {}


def with_commits(config: RunConfig, found: Mapping[str, Mapping[str, str]]) -> RunConfig:
    """The run with these commits as revisions."""
    if not found:
        return config
    data = {
        name: entry.model_copy(update={"revision": found[name]["commit"]}) if name in found else entry
        for name, entry in config.data.items()
    }
    return config.model_copy(update={"data": resolve_mixes(resolve_stage_data(data, config.stages, config.folder))})
