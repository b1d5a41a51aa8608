"""The run that most whole-run tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import undisturbed


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; not to be changed. Tests that read it carry the xdist group "runs"."""
    return undisturbed(tmp_path_factory.mktemp("undisturbed"))
