"""Ranks watch one another: one that fails, dies or freezes ends the whole run, and its reason is said first.

Every rank is linked to the main one (`mtkd.engine.links`). A link that closes without a goodbye is a process that died:
kill -9, no memory, a node switched off. A rank that fails says so before it leaves. When nothing got further for the
configured time, every rank writes where its threads stand into the run folder. Without this, the others wait in a
collective until torch's own time is over, and then complain about one another.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtkd.engine.dist import Dist, alive, seconds_still
from mtkd.engine.links import Links, Peer
from mtkd.errors import EXIT_INTERNAL, EXIT_LOST, LostRank, Stopped, UserError, masked, tell

# The seconds below were not derived: they were enough on two busy cores, and short enough to wait for.
_TICK = 0.5  # seconds between two looks
_ANSWER = 2.5  # seconds in which a rank must answer the main one, and half of what the main one has
_GRACE = 5.0  # seconds for a rank to end by itself once another one has failed
_PATIENCE = 2.0  # seconds in which another rank's reason must be here to count as the cause of this one's error
_LAST_RESORT = 20.0  # seconds after which a thread of C writes the stacks, should Python itself be stuck
_AGAIN = "what was saved is whole: run it again to go on"


@dataclass(frozen=True)
class Verdict:
    """Why the run ends: the reason in words, the exit code of all ranks, whether to write stacks, who to wake."""

    text: str
    code: int
    stacks: bool = False
    stopped: tuple[tuple[str, int], ...] = ()  # host and process id of ranks that do not answer


@contextmanager
def watched(dist: Dist, timeout: float, logs: Path) -> Iterator[None]:
    """Within it this rank watches the others, and they it. A collective at its start.

    Args:
        timeout: seconds after which a run that gets no further ends.
        logs: folder for ``rank-N.stacks``, made when it is needed.
    Raises:
        LostRank: in place of an error that another rank's end has caused here.
    """
    if dist.world_size == 1:
        yield
        return
    watch = _Watch(dist, timeout, logs)
    try:
        yield
    except BaseException as error:
        reason = watch.failed(error)
        if reason is error:
            raise
        raise reason from error
    else:
        watch.done()


class _Watch:
    """One rank's part: a thread that listens and judges. On the main rank it also hands on what it hears."""

    def __init__(self, dist: Dist, timeout: float, logs: Path) -> None:
        self._dist, self._timeout, self._logs = dist, timeout, logs
        self._name = f"rank {dist.rank} (pid {os.getpid()} on {socket.gethostname()})"
        self._verdict: Verdict | None = None
        self._judged, self._over = threading.Event(), False
        self._deadline = float("inf")
        self._asked: float | None = None
        self._links = Links(dist, self._name)
        alive()
        threading.Thread(target=self._run, name="mtkd-watch", daemon=True).start()

    # What the main thread says

    def done(self) -> None:
        """This rank is through: its end is no death."""
        self._finish({"left": True})

    def failed(self, error: BaseException) -> BaseException:
        """What to raise for `error`: itself, which the others hear of, or the reason of another rank that caused it."""
        if not isinstance(error, UserError | Stopped) and self._logs.is_dir():
            note(self._logs / f"rank-{self._dist.rank}.log", "".join(traceback.format_exception(error)))
        # a lost peer is a RuntimeError of torch's; anything else is this rank's own
        if isinstance(error, RuntimeError) and self._judged.wait(_PATIENCE):
            assert self._verdict is not None
            self._finish({"left": True})
            return LostRank(f"{self._verdict.text}\n  here:    {type(error).__name__}: {_first_line(error)}",
                            code=self._verdict.code, todo=_AGAIN)  # fmt: skip
        code = error.exit_code if isinstance(error, UserError | Stopped) else EXIT_INTERNAL
        reason = _first_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {_first_line(error)}"
        self._finish({"failed": f"{self._name} failed: {reason}", "code": code})
        return error

    def _finish(self, message: dict[str, Any]) -> None:
        with self._links.lock:  # else the thread could close the links before the goodbye is sent
            self._over = True
            self._links.tell(message)
        faulthandler.cancel_dump_traceback_later()

    # The thread

    def _run(self) -> None:
        armed = 0.0
        while not self._over or (self._dist.is_main and self._links):  # another rank may still say why it ends
            for end, peer, message in self._links.heard(_TICK):
                if message is not None:
                    self._read(message, end, peer)
                elif not peer.left and not self._over:
                    text = f"{peer.name} ended without a word: killed, out of memory, or ended by a library"
                    self._judge(Verdict(text, EXIT_LOST))
            now = time.monotonic()
            if self._over:
                faulthandler.cancel_dump_traceback_later()  # again: `_finish` may have come between two lines below
                continue
            if now - armed > _LAST_RESORT / 2:  # should Python itself be stuck: a thread without it
                armed = now
                left = max(self._timeout - seconds_still(), 0) + _LAST_RESORT
                faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or sys.stderr)
            if self._verdict is None:
                self._look(now)
            if now > self._deadline:
                self._exit()
        faulthandler.cancel_dump_traceback_later()
        self._links.close()

    def _read(self, message: dict[str, Any], end: Any, peer: Peer) -> None:
        if "asked" in message:
            self._links.answer(end, {"still": seconds_still()})
        if "still" in message:
            peer.still = message["still"]
        if "left" in message:
            peer.left = True
        if "failed" in message:
            peer.left = True
            self._judge(Verdict(message["failed"], message["code"]))
        if "verdict" in message:
            fields = message["verdict"]
            self._judge(Verdict(**{**fields, "stopped": tuple(map(tuple, fields["stopped"]))}))

    def _look(self, now: float) -> None:
        """Whether no rank gets further. The main rank asks all and judges; the others ask only whether it lives."""
        peers = self._links.peers()
        if seconds_still() <= self._timeout:
            self._asked = None
        elif self._asked is None:
            self._asked = now
            for peer in peers:
                peer.still = None
            self._links.tell({"asked": True})
        elif now - self._asked > (_ANSWER if self._dist.is_main else 2 * _ANSWER):
            self._asked = None
            silent = [peer for peer in peers if peer.still is None]
            busy = any(peer.still is not None and peer.still <= self._timeout for peer in peers)
            if (silent or self._dist.is_main) and not busy:
                self._judge(self._frozen(silent))

    def _frozen(self, silent: list[Peer]) -> Verdict:
        text = f"nothing got further for {self._timeout:g} s (engine.timeout_seconds); "
        text += f"no sign of life from {', '.join(p.name for p in silent)}" if silent else "all ranks answer"
        text += f"; where they stand: {self._logs}/rank-*.stacks"
        return Verdict(text, EXIT_LOST, True, tuple((p.host, p.pid) for p in silent))

    def _judge(self, verdict: Verdict) -> None:
        """The first reason counts: tell the others, then end by itself or after a while."""
        if self._verdict is not None:
            return
        self._verdict = verdict
        if self._dist.is_main or verdict.stacks:  # a main rank that is woken must not take our end for the reason
            self._links.tell({"verdict": vars(verdict)})
        if self._logs.is_dir():
            note(self._logs / f"rank-{self._dist.rank}.log", f"ends: {verdict.text}")
        self._deadline = time.monotonic() + (0 if verdict.stacks else _GRACE)
        if verdict.stacks:
            self._write_stacks(verdict)
        self._judged.set()

    def _exit(self) -> None:
        """The main thread did not end by itself: it waits for a rank that is gone."""
        assert self._verdict is not None
        tell(f"mtkd: {self._verdict.text}\n  do:      {_AGAIN}")
        if self._dist.is_main:  # what was said must be read before the connections close
            self._links.drain(_GRACE, _TICK)
        sys.stdout.flush()
        os._exit(self._verdict.code)

    # Stacks

    def _write_stacks(self, verdict: Verdict) -> None:
        """This rank's stacks; those that are stopped (SIGSTOP, a debugger) are woken to write theirs."""
        for host, pid in verdict.stopped:
            if host == socket.gethostname():
                with suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
        with suppress(OSError):
            self._logs.mkdir(parents=True, exist_ok=True)
            with (self._logs / f"rank-{self._dist.rank}.stacks").open("w") as file:
                file.write(f"{self._name}: {verdict.text}\n\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)


def note(log: Path, text: str) -> None:
    """Add to a rank's log, with the time; a log that cannot be written stops nothing."""
    with suppress(OSError):
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file:
            file.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {masked(text)}\n")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
