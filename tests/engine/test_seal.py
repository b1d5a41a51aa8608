"""Sealed folders under kills and damage (faults F04, F06 and F19)."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mtkd.engine.dist import Dist
from mtkd.engine.jsonlines import append_jsonl, read_jsonl
from mtkd.engine.record import record_text
from mtkd.engine.seal import (
    MANIFEST,
    check_seal,
    newest_sealed,
    save_sealed,
    seal,
    sweep_left,
    write_atomic,
    write_sealed,
)
from mtkd.errors import DataError, UserError

KILLED = -9


def shards(step: int) -> Callable[[Path], None]:
    """Writes what an engine might: two shards in a sub-folder and a state file, different at every step."""

    def write(folder: Path) -> None:
        (folder / "shards").mkdir(exist_ok=True)
        for number in range(2):
            (folder / "shards" / f"{number}.bin").write_bytes(f"{step}-{number}".encode() * 1000)
        (folder / "state.json").write_text(json.dumps({"step": step}))

    return write


def save(parent: Path, step: int, keep: int = 2) -> Path:
    return save_sealed(parent, step, shards(step), {"zero_stage": 0}, dist=Dist(), keep=keep)


def names(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir())


# ---- whole saves


def test_a_checkpoint_is_sealed_found_and_pruned(tmp_path: Path) -> None:
    """The newest by number is found whole, and two are kept."""
    for step in (5, 90, 100, 1_000_000):
        path = save(tmp_path, step)
        assert check_seal(path)["step"] == step
    assert names(tmp_path) == ["step-000100", "step-1000000"]
    found = newest_sealed(tmp_path)
    assert found.path == tmp_path / "step-1000000"  # by number, not by name
    assert (found.manifest["step"], found.manifest["zero_stage"], found.skipped) == (1_000_000, 0, [])
    assert set(found.manifest["files"]) == {"shards/0.bin", "shards/1.bin", "state.json"}


def test_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    for parent in (tmp_path, tmp_path / "none"):
        found = newest_sealed(parent)
        assert (found.path, found.skipped) == (None, [])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (path / "state.json").write_text("broken")
    assert newest_sealed(tmp_path).path is None
    save(tmp_path, 1)
    assert newest_sealed(tmp_path).path == path
    assert names(tmp_path) == ["step-000001"]


def test_pruning_does_not_count_a_broken_checkpoint_as_kept(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "step-000002" / "state.json").unlink()
    save(tmp_path, 3)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]  # 1 and 3 are the two usable ones
    save(tmp_path, 4)
    assert names(tmp_path) == ["step-000003", "step-000004"]


def test_equal_content_gives_an_equal_manifest(tmp_path: Path) -> None:
    first = (save(tmp_path / "a", 7) / MANIFEST).read_bytes()
    second = (save(tmp_path / "b", 7) / MANIFEST).read_bytes()
    assert first == second


# ---- F04: kill -9 in the middle of a save

SAVE_THREE = """
import os, signal, sys
from pathlib import Path
from mtkd.engine.dist import Dist
from mtkd.engine.seal import save_sealed

def write(folder):
    (folder / "a.bin").write_bytes(b"a" * 5000)
    if sys.argv[2] == "half-shard" and folder.name.endswith("3"):
        os.kill(os.getpid(), signal.SIGKILL)
    (folder / "b.bin").write_bytes(b"b" * 5000)

for step in (1, 2, 3):
    save_sealed(Path(sys.argv[1]), step, write, {}, dist=Dist(), keep=2)
"""


@pytest.mark.parametrize(
    ("point", "newest"),
    [
        ("before-shard@3", 2),
        ("half-shard", 2),
        ("after-shard@3", 2),
        ("before-manifest@3", 2),
        ("after-manifest@3", 2),
        ("after-rename@3", 3),
        ("while-pruning@1", 3),
    ],
)
def test_a_kill_during_a_save_loses_nothing_that_was_sealed(point: str, newest: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVE_THREE, str(tmp_path), point]
    killed = subprocess.run(command, env={**os.environ, "MTKD_TEST_KILL_AT": point}, timeout=600)
    assert killed.returncode == KILLED
    found = newest_sealed(tmp_path)
    assert found.path == tmp_path / f"step-{newest:06d}"
    assert found.skipped == []
    assert check_seal(tmp_path / f"step-{newest - 1:06d}")["step"] == newest - 1
    # The next save sweeps up what the killed one left and keeps what it is told to.
    save(tmp_path, newest + 1)
    assert names(tmp_path) == [f"step-{s:06d}" for s in (newest, newest + 1)]


def test_the_kill_points_are_reached_only_when_asked_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SAVE_THREE, str(tmp_path), ""]
    subprocess.run(command, env={**os.environ, "MTKD_TEST_KILL_AT": "after-shard@4"}, timeout=600, check=True)
    assert newest_sealed(tmp_path).path == tmp_path / "step-000003"


# ---- F06: damage


def truncate(folder: Path) -> Path:
    os.truncate(folder / "shards" / "1.bin", 100)
    return folder / "shards" / "1.bin"


def extend(folder: Path) -> Path:
    with (folder / "state.json").open("a") as file:
        file.write(" ")
    return folder / "state.json"


def flip_a_bit(folder: Path) -> Path:
    file = folder / "shards" / "0.bin"
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)
    return file


def lose(folder: Path) -> Path:
    (folder / "shards" / "0.bin").unlink()
    return folder / "shards" / "0.bin"


def swap(folder: Path) -> Path:
    first, second, aside = (folder / "shards" / name for name in ("0.bin", "1.bin", "aside"))
    first.rename(aside)
    second.rename(first)
    aside.rename(second)
    return first


def add(folder: Path) -> Path:
    (folder / "shards" / "payload.pt").write_bytes(b"x")
    return folder / "shards" / "payload.pt"


def add_latest(folder: Path) -> Path:
    (folder / "latest").write_text("../../../etc")
    return folder / "latest"


def link_out(folder: Path) -> Path:
    target = folder.parent.parent / "outside.bin"
    file = folder / "shards" / "1.bin"
    file.rename(target)  # same bytes, but somebody else's path
    file.symlink_to(target)
    return file


def link_folder_out(folder: Path) -> Path:
    (folder / "shards").rename(folder.parent.parent / "outside")
    (folder / "shards").symlink_to(folder.parent.parent / "outside")
    return folder / "shards"


def unseal(folder: Path) -> Path:
    (folder / MANIFEST).unlink()
    return folder


def garble_manifest(folder: Path) -> Path:
    os.truncate(folder / MANIFEST, 40)
    return folder / MANIFEST


DAMAGES = {
    truncate: "wrong size",
    extend: "wrong size",
    flip_a_bit: "content differs",
    lose: "is missing",
    swap: "content differs",
    add: "not in the manifest",
    add_latest: "not in the manifest",
    link_out: "a link or special file",
    link_folder_out: "a link or special file",
    unseal: "never sealed",
    garble_manifest: "not a JSON object",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damage_is_refused_with_file_and_reason_and_the_older_one_used(
    damage: Callable[[Path], Path], tmp_path: Path
) -> None:
    parent = tmp_path / "checkpoints"
    save(parent, 1)
    newest = save(parent, 2)
    file = damage(newest)
    with pytest.raises(DataError, match=DAMAGES[damage]) as caught:
        check_seal(newest)
    assert caught.value.where == str(file)
    found = newest_sealed(parent)
    assert found.path == parent / "step-000001"
    assert len(found.skipped) == 1
    assert str(file) in found.skipped[0]


@pytest.mark.parametrize("content", ["../../../etc", "step-000009", "", "step-000002/../../x", "\x00"])
def test_latest_files_are_ignored(content: str, tmp_path: Path) -> None:
    """Files that other libraries read the newest step from decide nothing here."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").write_text(content)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(content)
    assert newest_sealed(tmp_path).path == tmp_path / "step-000002"


def test_a_renamed_or_linked_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2).rename(tmp_path / "step-000009")
    (tmp_path / "step-000008").symlink_to(tmp_path / "step-000001")
    found = newest_sealed(tmp_path)
    assert found.path == tmp_path / "step-000001"
    assert "sealed as step 2" in found.skipped[0]
    assert "not a folder" in found.skipped[1]


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "shards/../../x", "./state.json", "a//b", MANIFEST, ""]
)
def test_a_manifest_that_names_a_file_outside_is_refused_before_anything_is_opened(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["state.json"]
    del manifest["sha256"]
    (folder / MANIFEST).write_text(record_text(manifest))
    with pytest.raises(DataError, match="names a file outside"):
        check_seal(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        "[]",
        "3",
        "{}",
        '{"files": []}',
        '{"files": {"a": 3}}',
        '{"files": {"a": {"size": "1", "sha256": "x"}}}',
        "[" * 9999,
    ],
)
def test_a_malformed_manifest_is_refused(manifest: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / MANIFEST).write_text(manifest)
    with pytest.raises(DataError, match=r"malformed|not a JSON"):
        check_seal(folder)


def test_another_users_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 1)
    if os.geteuid() == 0:
        os.chown(folder / "state.json", 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(DataError, match="belongs to another user"):
        check_seal(folder)


def test_a_parent_that_is_a_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1)


# ---- write_sealed (exports)


def test_an_export_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    export = tmp_path / "export"
    write_sealed(export, shards(1), {"step": 1})
    (export / "stale.txt").write_text("")

    def fail(folder: Path) -> None:
        shards(2)(folder)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        write_sealed(export, fail, {"step": 2})
    assert json.loads((export / "state.json").read_text()) == {"step": 1}
    write_sealed(export, shards(2), {"step": 2})
    assert check_seal(export)["step"] == 2  # the stale file is gone, or this would refuse
    assert names(tmp_path) == ["export"]
    again = (export / MANIFEST).read_bytes()
    shutil.rmtree(export)
    write_sealed(export, shards(2), {"step": 2})
    assert (export / MANIFEST).read_bytes() == again


def test_seal_covers_exactly_what_is_there(tmp_path: Path) -> None:
    """Every file with its size and the SHA-256 that `sha256sum` prints."""
    shards(3)(tmp_path)
    seal(tmp_path, {})
    files: dict[str, Any] = check_seal(tmp_path)["files"]
    for name, entry in files.items():
        told = subprocess.run(["sha256sum", str(tmp_path / name)], capture_output=True, text=True, check=True).stdout
        assert entry == {"size": (tmp_path / name).stat().st_size, "sha256": told.split()[0]}
    (tmp_path / "more").write_text("")
    seal(tmp_path, {})
    assert "more" in check_seal(tmp_path)["files"]


# ---- single files


def test_write_atomic_names_the_file_that_cannot_be_written(tmp_path: Path) -> None:
    """Not the one written aside, of which nobody has heard."""
    with pytest.raises(IsADirectoryError) as folder:
        write_atomic(tmp_path, "text")
    with pytest.raises(FileNotFoundError) as missing:
        write_atomic(tmp_path / "nowhere" / "file", "text")
    assert folder.value.filename == str(tmp_path)
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")


def test_write_atomic_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_atomic(file, "é")
    write_atomic(file, b"\x00\x01")
    assert file.read_bytes() == b"\x00\x01"
    with pytest.raises(TypeError):
        write_atomic(file, 3)  # type: ignore[arg-type]
    assert file.read_bytes() == b"\x00\x01"
    assert names(tmp_path) == ["a.json"]


def test_json_lines_survive_nan_and_a_killed_writer(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_jsonl(file) == []
    append_jsonl(file, {"loss": math.nan, "worst": [math.inf, -math.inf, 1.5], "text": "a\nb"})
    append_jsonl(file, {"step": 2})
    first = {"loss": None, "worst": [None, None, 1.5], "text": "a\nb"}
    assert read_jsonl(file) == [first, {"step": 2}]
    whole = file.read_bytes()
    for cut in range(1, len('{"step": 2}\n')):
        file.write_bytes(whole[:-cut])
        assert read_jsonl(file) == [first]
        append_jsonl(file, {"step": 3})
        assert read_jsonl(file) == [first, {"step": 3}]
    file.write_bytes(b'{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(DataError, match="not a JSON object") as caught:
        read_jsonl(file)
    assert caught.value.where == f"{file}:2"


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    """R11: half-written and half-removed files go at the next start; one that a living process writes stays."""
    stage = tmp_path / "stages/01-s/checkpoints"
    for folder in (stage / ".trash-step-000006", stage / ".tmp-step-000008"):
        folder.mkdir(parents=True)
        (folder / "weights").write_text("x")
    (tmp_path / ".tmp-metrics.jsonl-4194304").write_text("x")  # larger than any process number
    live = tmp_path / f".tmp-report.html-{os.getppid()}"
    live.write_text("x")
    (stage / "step-000004").mkdir()
    sweep_left(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        live.name,
        "01-s",
        "checkpoints",
        "stages",
        "step-000004",
    ]
