"""A checkpoint that one of several ranks cannot write: all are told, the earlier one stays (faults F05 and F07)."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from mtkd.engine.dist import Dist, on_main, together
from mtkd.engine.seal import check_seal, newest_sealed, save_sealed
from mtkd.engine.testing import RankError, run_distributed
from mtkd.errors import UserError


def names(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir())


def fail_on(rank: int, error: str, parent: str) -> tuple[str, list[str], list[str]]:
    """Save a good checkpoint, then one in which a rank fails; what this rank was told, and what is left."""
    dist, folder = Dist.current(), Path(parent)

    def good(path: Path) -> None:
        (path / f"shard-{dist.rank}.bin").write_bytes(bytes(1000))

    def bad(path: Path) -> None:
        good(path)
        if dist.rank == rank:
            raise {"os": OSError(28, "No space left on device"), "type": TypeError("a bug")}[error]

    save_sealed(folder, 1, good, {"world_size": dist.world_size}, dist=dist, keep=2)
    try:
        save_sealed(folder, 2, bad, {}, dist=dist, keep=2)
    except Exception as caught:
        message = f"{type(caught).__name__}: {caught}"
    else:
        message = "nothing"
    dist.barrier()
    return message, names(folder), sorted(check_seal(folder / "step-000001")["files"])


@pytest.mark.parametrize("rank", [0, 1])
def test_every_rank_is_told_when_one_has_no_disk_space(rank: int, tmp_path: Path) -> None:
    """One rank's ENOSPC is every rank's error, with its number, and leaves no half checkpoint."""
    for message, left, files in run_distributed(fail_on, 2, rank, "os", str(tmp_path)):
        assert message.startswith("UserError")
        assert f"rank {rank}: OSError: [Errno 28] No space left on device (free: " in message
        assert "needed: at least 2,001 bytes" in message  # more than the two shards that were written
        assert left == ["step-000001"]
        assert files == ["shard-0.bin", "shard-1.bin"]


def test_a_bug_in_one_rank_keeps_its_type_there_and_is_told_elsewhere(tmp_path: Path) -> None:
    (first, left, _), (second, _, _) = run_distributed(fail_on, 2, 1, "type", str(tmp_path))
    assert "rank 1: TypeError: a bug" in first
    assert first.startswith("UserError")
    assert second == "TypeError: a bug"
    assert left == ["step-000001"]


def die_while_writing(parent: str) -> None:
    dist = Dist.current()

    def write(path: Path) -> None:
        (path / f"shard-{dist.rank}.bin").write_bytes(bytes(1000))
        if dist.rank == 1 and path.name.endswith("2"):
            os.kill(os.getpid(), 9)

    for step in (1, 2):
        save_sealed(Path(parent), step, write, {}, dist=dist, keep=2)


def test_a_rank_killed_while_writing_leaves_the_earlier_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code -9"):
        run_distributed(die_while_writing, 2, str(tmp_path))
    found = newest_sealed(tmp_path)
    assert found.path == tmp_path / "step-000001"
    assert set(found.manifest["files"]) == {"shard-0.bin", "shard-1.bin"}


def save_over_the_limit(parent: str) -> str:
    import torch

    def write(path: Path) -> None:
        torch.save(torch.zeros(100_000), path / "weights.pt")

    save_sealed(Path(parent), 1, write, {}, dist=Dist(), keep=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        save_sealed(Path(parent), 2, write, {}, dist=Dist(), keep=2)
    except UserError as error:
        return str(error)
    return "nothing"


def test_a_file_size_limit_is_reported_with_bytes(tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as a quota: the message names the bytes."""
    # torch.save raises RuntimeError here and leaves a truncated file
    (message,) = run_distributed(save_over_the_limit, 1, str(tmp_path))
    (size,) = (entry["size"] for entry in check_seal(tmp_path / "step-000001")["files"].values())
    assert size > 400_000
    assert f"needed: at least {size:,} bytes" in message
    assert names(tmp_path) == ["step-000001"]


def fail_in_turn(parent: str) -> list[str]:
    """What this rank is told when the other one, or the main one alone, cannot do its part."""
    dist, told = Dist.current(), []

    def full() -> None:
        raise OSError(28, "No space left on device", parent)

    def bug() -> None:
        raise TypeError("a bug")

    def failed(message: str) -> UserError:
        return UserError(f"not made: {message}")

    for job in (
        lambda: on_main(dist, full),
        lambda: on_main(dist, bug),
        lambda: together(dist, lambda: full() if dist.rank == 1 else None, failed),
        lambda: together(dist, lambda: bug() if dist.rank == 1 else None, failed),
    ):
        try:
            job()
        except Exception as caught:
            told.append(f"{type(caught).__name__}: {caught}")
    told.append(str(dist.sum([1])))  # nobody is left waiting: the next collective is the same one
    return told


def test_a_failure_of_one_rank_reaches_all(tmp_path: Path) -> None:
    first, second = run_distributed(fail_in_turn, 2, str(tmp_path))
    assert first[0] == second[0]
    assert first[0].startswith("UserError")
    assert str(tmp_path) in first[0]
    assert "No space left" in first[0]
    assert first[1] == "TypeError: a bug"
    assert second[1] == "UserError: the main process failed: TypeError: a bug"
    assert first[2] == second[2]
    assert "rank 1: OSError" in first[2]
    assert first[3] == "UserError: not made: rank 1: TypeError: a bug"
    assert second[3] == "TypeError: a bug"
    assert first[4] == second[4] == "[2.0]"
