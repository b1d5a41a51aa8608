"""What ranks exchange apart from gradients: sums, agreement, small objects. One process alone imports no torch."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mtkd.engine.disk import full_disk
from mtkd.errors import UserError, on_every_rank

if TYPE_CHECKING:
    import torch

Object = TypeVar("Object")

_alive_at = time.monotonic()


@dataclass(frozen=True)
class Dist:
    """This process among `world_size` equal ones; every method but `is_main` is a collective.

    Attributes:
        rank: number of this process over all nodes, from 0.
        local_rank: its number on this node, which is also the number of its GPU.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @classmethod
    def current(cls) -> Dist:
        """This process in torch's default process group; alone when there is none."""
        # A group can only exist when torch has been imported already, so a light process stays light.
        if not _has_group():
            return cls()
        distributed = sys.modules["torch.distributed"]
        rank = distributed.get_rank()
        return cls(rank, distributed.get_world_size(), int(os.environ.get("LOCAL_RANK", rank)))

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Sequence[int | float]) -> list[float]:
        """Element-wise sum over ranks in float64: integers are exact up to 2**53."""
        if self.world_size == 1:
            return [float(v) for v in values]
        import torch

        total = torch.tensor([float(v) for v in values], dtype=torch.float64, device=self._device())
        torch.distributed.all_reduce(total)
        alive()
        return total.tolist()

    def all_ok(self, ok: bool) -> bool:
        """True when every rank says True; every rank gets the same answer."""
        return self.sum([not ok])[0] == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        # A sum instead of torch's barrier: the NCCL one guesses a device, and warns about it.
        self.sum([0])

    def gather_objects(self, value: Object) -> list[Object] | None:
        """Every rank's value in rank order on the main rank, None elsewhere. They are pickled: small plain values."""
        if self.world_size == 1:
            return [value]
        import torch

        values: list[Object | None] = [None] * self.world_size
        torch.distributed.all_gather_object(values, value)
        alive()
        return values if self.is_main else None  # type: ignore[return-value]

    def broadcast_object(self, value: Object) -> Object:
        """The main rank's value on every rank."""
        if self.world_size == 1:
            return value
        import torch

        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self._device())
        alive()
        return box[0]

    def _device(self) -> torch.device:
        import torch

        on_gpu = torch.distributed.get_backend() == "nccl"
        return torch.device("cuda", self.local_rank) if on_gpu else torch.device("cpu")


def alive() -> None:
    """Say that this process has got further: a collective, a step or a batch is finished."""
    global _alive_at
    _alive_at = time.monotonic()


def seconds_still() -> float:
    """Seconds since this process last got further."""
    return time.monotonic() - _alive_at


def leave(code: int) -> None:
    """End this process with exit code `code` when it is a rank of a process group; otherwise do nothing.

    Without the interpreter's own way out. gloo's threads free the tensors of collectives that are over a moment after
    the main thread went on, and one that wants the interpreter while that is being taken down aborts the process
    (pytorch/pytorch#190489): a run that is done and written would end with code -6. And a rank that failed has peers
    that wait for it: the group is not taken down in an orderly way then, which would wait for them.
    """
    if not _has_group():
        return
    if code == 0:
        import torch

        torch.distributed.destroy_process_group()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _has_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_available() and distributed.is_initialized()


def on_main(dist: Dist, action: Callable[[], Object]) -> Object:
    """Do something on the main rank; every rank gets its result, or raises its error.

    Raises:
        UserError: the action's own; for its OSError one that names the file. Any other error keeps its type on the
            main rank, and the others raise too: none waits for a rank that has left.
    """
    outcome: list[Object | UserError] = []
    bug: Exception | None = None
    if dist.is_main:
        try:
            outcome = [action()]
        except UserError as error:
            outcome = [error]
        except OSError as error:
            failure = UserError(f"{error.strerror or error}", where=error.filename or "", todo="fix it and try again")
            outcome = [full_disk(error) or failure]
        except Exception as error:
            bug = error
            outcome = [UserError(f"the main process failed: {type(error).__name__}: {error}")]
    value = dist.broadcast_object(outcome)[0]
    if bug is not None:
        raise bug
    if isinstance(value, UserError):
        raise on_every_rank(value)
    return value


def together(
    dist: Dist,
    job: Callable[[], Object],
    failed: Callable[[str], UserError],
    reason: Callable[[Exception], str] = lambda error: f"{type(error).__name__}: {error}",
) -> Object:
    """Do `job` on every rank; when it fails on one of them, all raise, so that none waits for one that has left.

    Args:
        failed: what to raise, given the reasons of the ranks that failed. reason: an error in words.
    Raises:
        UserError: the job's own on the rank that raised it; `failed` for an OSError or RuntimeError, and on ranks on
            which all went well. Any other error, a programmer's, keeps its type where it was raised.
    """
    error: Exception | None = None
    done: list[Object] = []
    try:
        done = [job()]
    except Exception as caught:
        error = caught
    if dist.all_ok(error is None):
        return done[0]
    reasons = dist.gather_objects(f"rank {dist.rank}: {reason(error)}" if error else "")
    message = dist.broadcast_object("; ".join(filter(None, reasons or [])))
    if error is not None and not isinstance(error, OSError | RuntimeError):
        raise error
    raise on_every_rank(failed(message)) from error
