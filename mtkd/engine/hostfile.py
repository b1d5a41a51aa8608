"""The hostfile of the DeepSpeed launcher: which nodes take part, and how many processes each one gets."""

from __future__ import annotations

import re
from pathlib import Path

from mtkd.errors import UserError, what_is

_LINE = re.compile(r"(\S+)\s+slots=(\d{1,4})\s*(#.*)?")
# What a host may be called: a user name, letters, digits. Nothing that a shell or pdsh would read as more than a name.
_HOST = re.compile(r"([\w.-]+@)?[A-Za-z0-9][\w.:-]*")


def read_hostfile(path: str) -> dict[str, int]:
    """Processes by node, in the order of the file.

    Raises:
        UserError: with the line, for all that DeepSpeed would refuse or misread.
    """
    where = f"engine.hostfile: {path}"
    if not Path(path).is_file():
        raise UserError(
            f"this is {what_is(Path(path))}" if Path(path).exists() else "there is no such file",
            where=where,
            todo="copy launch/hostfile.example, or give another working directory",
        )
    hosts: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        node = _LINE.fullmatch(text)
        if not node or int(node[2]) < 1 or not _HOST.fullmatch(node[1]):
            raise UserError(
                "not a node and its processes", where=f"{where}:{number}", found=text, allowed="node-1 slots=8"
            )
        if node[1] in hosts:
            raise UserError("the node is there twice", where=f"{where}:{number}", found=node[1])
        hosts[node[1]] = int(node[2])
    if not hosts:
        raise UserError("the file names no node", where=where, allowed="node-1 slots=8")
    return hosts
