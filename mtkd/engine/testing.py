"""What tests need, ours and those of a plug-in's author: functions run on several ranks of one machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


class RankError(RuntimeError):
    """A rank of `run_distributed` raised, died or did not end in time.

    Attributes:
        rank: the first rank that failed, -1 for a time-out.
        error: what it raised; None when it died, or when its exception cannot be pickled.
    """

    def __init__(self, message: str, rank: int = -1, error: BaseException | None = None) -> None:
        super().__init__(message)
        self.rank, self.error = rank, error


def run_distributed(
    function: Callable[..., Result], world_size: int, *args: object, timeout: float = 600
) -> list[Result]:
    """Call ``function(*args)`` on `world_size` fresh CPU processes joined in a gloo group.

    The processes are forks of multiprocessing's fork server, where the platform has one, with this process's
    environment: what `multiprocessing.set_forkserver_preload` names is imported once and not by every rank.

    Args:
        function: importable by name (a module-level function), like its arguments and result picklable.
        timeout: seconds for everything, start of the processes included.
    Returns:
        Each rank's result, in rank order.
    Raises:
        RankError: with the traceback of the first rank that failed; nothing is left running.
    """
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
    call = pickle.dumps((function, args))
    processes, pipes = [], []
    with tempfile.TemporaryDirectory(prefix="mtkd-ranks-") as folder:
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                place = (rank, world_size, str(Path(folder) / "store"), timeout)
                process = context.Process(target=_rank_main, args=(call, place, dict(os.environ), sender))
                process.start()
                sender.close()  # ours: the pipe must end when the rank does
                processes.append(process)
                pipes.append(receiver)
            return _collect(pipes, processes, time.monotonic() + timeout)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()


def _collect(pipes: list[Any], processes: list[Any], deadline: float) -> list[Any]:
    """Results in rank order; raises for the first failure, deaths before the errors they cause elsewhere."""
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [rank for rank in range(len(pipes)) if rank not in results]
        ready = connection.wait([pipes[r] for r in waiting], max(deadline - time.monotonic(), 0))
        if not ready:
            raise RankError(f"ranks {waiting} did not end in time")
        failures: list[RankError] = []
        for rank in (r for r in waiting if pipes[r] in ready):
            try:
                ok, payload, text = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join(timeout=10)
                code = processes[rank].exitcode
                failures.insert(0, RankError(f"rank {rank} ended with exit code {code} and no result", rank))
                continue
            if ok:
                results[rank] = pickle.loads(payload)
            else:
                error = pickle.loads(payload) if payload else None
                failures.append(RankError(f"rank {rank} failed:\n{text}", rank, error))
        if failures:
            raise failures[0]
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(call: bytes, place: tuple[int, int, str, float], environment: dict[str, str], sender: Any) -> None:
    rank, world_size, store, timeout = place
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The fork server's environment is that of its start.
    os.environ.clear()
    os.environ.update(environment)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "OMP_NUM_THREADS": 1}
    os.environ.update({name: str(value) for name, value in names.items()})
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # host names need not resolve in a container
    try:
        import torch

        torch.set_num_threads(1)
        # A file instead of a port: no other process can take it first.
        torch.distributed.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
        )
        function, args = pickle.loads(call)
        # Plain bytes: torch's own pickling would share memory with a process that is about to end.
        message = pickle.dumps((True, pickle.dumps(function(*args)), ""))
    except BaseException as error:
        message = pickle.dumps((False, _pickled(error), traceback.format_exc()))
    sender.send_bytes(message)
    sender.close()


def _pickled(error: BaseException) -> bytes:
    """The exception as bytes; empty when it does not survive the way there and back."""
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
    except Exception:
        return b""
    return payload


def _end_with_parent() -> None:
    """Leave when the process that started this rank is gone, even by kill -9."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)
