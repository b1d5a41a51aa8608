"""Connections between the main rank and every other one, next to those of torch: lines of JSON, both ways.

A process that dies closes its connection: the other end reads that at once, while torch's collectives would wait.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mtkd.engine.dist import Dist
from mtkd.errors import UserError

_JOIN = 60.0  # seconds for all ranks to connect
_HELLO = 5.0  # seconds for who connects to say the run's word
_KEEP_ALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}  # a node without power says nothing


@dataclass
class Peer:
    """The other end of a connection."""

    name: str
    host: str
    pid: int
    unread: bytes = b""
    still: float | None = None  # seconds since it last got further, as it answered
    left: bool = False


class Links:
    """This rank's connections: those of the main rank to all others, those of another rank to the main one.

    Made by every rank at the same time, a collective. One thread listens and closes, another one may `tell`.

    Attributes:
        lock: nothing is closed while it is held.
    Raises:
        UserError: the ranks cannot reach the main one.
    """

    def __init__(self, dist: Dist, name: str) -> None:
        self._selector = selectors.DefaultSelector()
        self.lock = threading.RLock()
        server = _listen(dist.world_size) if dist.is_main else None
        mine = (name, socket.gethostname(), os.getpid())
        # The word keeps out a program that scans the ports of this machine.
        port, word, main = dist.broadcast_object(
            (server.getsockname()[1] if server else 0, secrets.token_hex(16), mine)
        )
        try:
            if server is not None:
                self._accept(server, word, dist.world_size - 1)
            else:
                end = socket.create_connection((os.environ.get("MASTER_ADDR", "127.0.0.1"), port), _JOIN)
                _send(end, {"word": word, "who": mine})
                self._add(end, Peer(*main))
            ok = True
        except OSError:
            ok = False
        if not dist.all_ok(ok):
            raise UserError("the ranks could not connect to the main rank", where="MASTER_ADDR",
                            found=f"{os.environ.get('MASTER_ADDR')}:{port}",
                            todo="open the ports above 1023 between the nodes")  # fmt: skip
        os.register_at_fork(after_in_child=self._forget)  # a forked child would keep the connections open

    def __bool__(self) -> bool:
        """Whether any connection is open."""
        return bool(self._selector.get_map())

    def peers(self) -> list[Peer]:
        """The other ends that have not said goodbye."""
        return [key.data for key in self._selector.get_map().values() if not key.data.left]

    def heard(self, seconds: float) -> Iterator[tuple[Any, Peer, dict[str, Any] | None]]:
        """What arrives within so many seconds: connection, who, message; None instead of one where it closed."""
        for key, _ in self._selector.select(seconds):
            end, peer = key.fileobj, key.data
            try:
                data = end.recv(65536)  # type: ignore[union-attr]
            except BlockingIOError:
                continue
            except OSError:
                data = b""
            if not data:
                with self.lock:
                    self._close(end)
                yield end, peer, None
                continue
            *lines, peer.unread = (peer.unread + data).split(b"\n")
            for line in lines:
                yield end, peer, json.loads(line)

    def answer(self, end: Any, message: dict[str, Any]) -> None:
        """Send to one other end."""
        _send(end, message)

    def tell(self, message: dict[str, Any]) -> None:
        """Send to all other ends."""
        with self.lock:
            for key in list(self._selector.get_map().values()):
                _send(key.fileobj, message)

    def close(self) -> None:
        """Close every connection."""
        with self.lock:
            for key in list(self._selector.get_map().values()):
                self._close(key.fileobj)

    def drain(self, seconds: float, tick: float) -> None:
        """Wait until the others have closed their ends, so that what was sent last is read; at most so long."""
        limit = time.monotonic() + seconds
        while self and time.monotonic() < limit:
            for key, _ in self._selector.select(tick):
                with suppress(OSError):
                    if not key.fileobj.recv(65536):  # type: ignore[union-attr]
                        self._close(key.fileobj)

    def _accept(self, server: socket.socket, word: str, missing: int) -> None:
        limit = time.monotonic() + _JOIN
        with server:
            while missing:
                server.settimeout(max(limit - time.monotonic(), 0.01))
                end, _ = server.accept()
                end.settimeout(_HELLO)
                try:
                    hello = json.loads(end.makefile("rb").readline(10_000))
                    trusted = secrets.compare_digest(str(hello["word"]), word)
                    peer = Peer(*hello["who"])
                except (OSError, ValueError, KeyError, TypeError):
                    trusted = False
                if not trusted:
                    end.close()
                    continue
                self._add(end, peer)
                missing -= 1

    def _add(self, end: socket.socket, peer: Peer) -> None:
        end.setblocking(False)
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._selector.register(end, selectors.EVENT_READ, peer)

    def _close(self, end: Any) -> None:
        self._selector.unregister(end)
        end.close()

    def _forget(self) -> None:
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)


def _send(end: Any, message: dict[str, Any]) -> None:
    with suppress(OSError):  # a closed connection is found when it is read
        end.sendall(json.dumps(message).encode() + b"\n")


def _listen(backlog: int) -> socket.socket:
    with suppress(OSError):  # no IPv6 here
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=backlog)
    return socket.create_server(("", 0), backlog=backlog)
