"""Collectives on real processes, and the helper that starts them."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mtkd.engine.dist import Dist
from mtkd.engine.testing import RankError, run_distributed
from mtkd.errors import DataError


def collectives() -> dict[str, object]:
    dist = Dist.current()
    return {
        "place": (dist.rank, dist.world_size, dist.local_rank, dist.is_main),
        "sum": dist.sum([dist.rank + 1, 0.5, 2**52 + 1]),
        "one_bad": dist.all_ok(dist.rank != 1),
        "all_good": dist.all_ok(True),
        "gathered": dist.gather_objects({"rank": dist.rank}),
        "said": dist.broadcast_object(f"from {dist.rank}"),
        "pid": os.getpid(),
    }


def test_collectives_of_two_ranks() -> None:
    """Place, sum, agreement, broadcast and gather, each against what is written out here."""
    first, second = run_distributed(collectives, 2)
    assert first["place"] == (0, 2, 0, True)
    assert second["place"] == (1, 2, 1, False)
    for rank in (first, second):
        assert rank["sum"] == [3.0, 1.0, float(2**53 + 2)]
        assert rank["one_bad"] is False
        assert rank["all_good"] is True
        assert rank["said"] == "from 0"
    assert first["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert second["gathered"] is None
    assert first["pid"] != second["pid"] != os.getpid()


def test_alone_answers_without_torch() -> None:
    code = """
import sys
from mtkd.engine.dist import Dist
d = Dist.current()
assert d == Dist(0, 1, 0) and d.is_main
assert d.sum([1, 2.5]) == [1.0, 2.5] and d.all_ok(True) and not d.all_ok(False)
assert d.gather_objects("x") == ["x"] and d.broadcast_object("y") == "y"
d.barrier()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def write_pid(folder: str) -> None:
    """In the file's name: a rank may be ended at any time, also between making a file and writing into it."""
    Path(folder, str(os.getpid())).touch()


def fail_on_rank_one(folder: str) -> None:
    write_pid(folder)
    if Dist.current().rank == 1:
        raise DataError("the shard is broken", where="shard 1")
    Dist.current().barrier()


def die_on_rank_one() -> None:
    if Dist.current().rank == 1:
        os._exit(3)
    Dist.current().barrier()


def sleep_on_rank_one(folder: str) -> None:
    write_pid(folder)
    if Dist.current().rank == 1:
        time.sleep(6000)


def assert_none_left(folder: Path) -> None:
    assert multiprocessing.active_children() == []
    started = list(folder.iterdir())
    assert started
    for file in started:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.name), 0)


def test_the_failing_ranks_error_is_raised_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="shard 1: the shard is broken") as caught:
        run_distributed(fail_on_rank_one, 2, str(tmp_path))
    assert caught.value.rank == 1
    assert isinstance(caught.value.error, DataError)
    assert caught.value.error.where == "shard 1"
    assert "fail_on_rank_one" in str(caught.value)  # the traceback, not only the message
    assert_none_left(tmp_path)


def test_a_rank_that_dies_is_named_before_the_others_complaints() -> None:
    with pytest.raises(RankError, match="rank 1 ended with exit code 3"):
        run_distributed(die_on_rank_one, 2)


def test_a_hanging_rank_is_ended_at_the_timeout(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="did not end in time"):
        run_distributed(sleep_on_rank_one, 2, str(tmp_path), timeout=5)
    assert_none_left(tmp_path)


@pytest.mark.parametrize("code", [0, 3])
def test_a_rank_leaves_without_the_interpreters_end(code: int) -> None:
    """What is said arrives, the exit code stays, and nothing of the interpreter's end is run: torch may abort there."""
    program = f"""
import atexit, os, sys, torch
from mtkd.engine.dist import leave
atexit.register(os.abort)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
sys.stdout.write("said")
leave({code})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout[-4:]) == (code, "said"), done.stderr


def test_who_is_no_rank_stays() -> None:
    """`leave` does nothing without a process group."""
    program = "import torch; from mtkd.engine.dist import leave; leave(3); print('here')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, "here\n"), done.stderr
