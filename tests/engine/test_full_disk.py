"""A full disk, TMPDIR among them: which folder it is, how much is free, what helps; never "a bug in mtkd" (D21)."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from mtkd.cli import app as cli
from mtkd.engine.disk import full_disk
from mtkd.engine.dist import Dist, on_main
from mtkd.errors import EXIT_INTERNAL, EXIT_USAGE, UserError

ENOSPC = "No space left on device"


def compilers() -> Exception:
    """torch's compiler has the system's words in the middle of its own."""
    return RuntimeError(f"C++ compile error\nfatal error: error closing /x/a.s: {ENOSPC}\ncompilation terminated.")


def behind_another() -> Exception:
    error = ValueError("cannot be saved")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    return error


def no_folder_at_all() -> Exception:
    return FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp', '/var/tmp']")


@pytest.mark.parametrize("error", [compilers(), behind_another(), no_folder_at_all(), OSError(errno.ENOSPC, ENOSPC)])
def test_the_folder_for_temporary_files_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(cli, "app", fail)
    assert cli._exit_code() == EXIT_USAGE
    said = capsys.readouterr().err
    assert f"mtkd: {tmp_path}: a disk is full" in said
    assert f"{tmp_path} (TMPDIR): " in said
    assert "bytes are free" in said
    assert "set TMPDIR to a folder on another disk" in said
    assert "Traceback" not in said


def test_a_file_is_told_with_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder for temporary files beside it; where TMPDIR does not exist, that is said."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))

    def fail() -> None:
        raise OSError(errno.ENOSPC, ENOSPC, str(tmp_path / "file"))

    with pytest.raises(UserError, match="a disk is full") as caught:
        on_main(Dist(), fail)
    assert caught.value.where == str(tmp_path)
    assert f"{tmp_path / 'gone'} (TMPDIR): No such file or directory" in str(caught.value.found)


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    assert full_disk(OSError(errno.EACCES, "Permission denied", "/x")) is None
    monkeypatch.setattr(cli, "app", fail)
    assert cli._exit_code() == EXIT_INTERNAL
