"""Two nodes on one machine: network namespaces that see each other through a pair of virtual cards, nothing else."""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000  # from <linux/sched.h>


@dataclass(frozen=True)
class Nodes:
    """Names of the namespaces, of the card in each, and their addresses."""

    names: tuple[str, str]
    cards: tuple[str, str]
    addresses: tuple[str, str]

    def pids(self, node: int) -> list[int]:
        """Processes that run on a node."""
        return [int(pid) for pid in _ip("netns", "pids", self.names[node]).split()]

    def switch_off(self, node: int) -> None:
        """kill -9 of everything on a node."""
        while pids := self.pids(node):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)


def why_not() -> str:
    """Why this machine cannot make namespaces; "" when it can."""
    if shutil.which("ip") is None:
        return "no `ip` (Debian: iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with two_nodes():
            return ""
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed: {error.stderr.strip()}"


@contextmanager
def two_nodes() -> Iterator[Nodes]:
    """Make the nodes; whatever runs on them is killed at the end, and nothing of them stays."""
    mark = secrets.token_hex(3)
    names, cards = (f"mtkd-{mark}-0", f"mtkd-{mark}-1"), (f"v{mark}0", f"v{mark}1")
    nodes = Nodes(names, cards, ("10.213.7.1", "10.213.7.2"))
    try:
        for name in names:
            _ip("netns", "add", name)
        _ip("link", "add", cards[0], "netns", names[0], "type", "veth", "peer", "name", cards[1], "netns", names[1])
        for name, card, address in zip(names, cards, nodes.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", card)
            for link in (card, "lo"):
                _ip("-n", name, "link", "set", link, "up")
        yield nodes
    finally:
        for number, name in enumerate(names):
            with suppress(subprocess.CalledProcessError):
                nodes.switch_off(number)
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def enter(name: str) -> None:
    """Move this process into a node; for `processes.start(prepare=...)`."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns", name)
    os.close(descriptor)


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=300).stdout
