"""What the ranks of a run compare before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

import mtkd
from mtkd.running.agreement import _code_digest


def test_the_digest_of_the_code_covers_every_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Law: one changed byte in any package changes the digest."""
    deep = tmp_path / "losses" / "deep.py"
    deep.parent.mkdir()
    deep.write_text("a = 1\n")
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(mtkd, "__file__", str(tmp_path / "__init__.py"))
    before = _code_digest.__wrapped__()
    deep.write_text("a = 2\n")
    assert _code_digest.__wrapped__() != before
