"""What looks like a token or a password, so that none is written down, shown, or put on a command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_HIDDEN = "***"
_NAME = re.compile(r"(?<![a-z])(token|password|passwd|secret|api[-_]?key)(?![a-z])", re.IGNORECASE)
_VALUE = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_)[\w-]{8,}|(?<=://)[^/@\s]+(?=@)")


def is_secret(name: str, value: str) -> bool:
    """Whether a variable called `name` with this value must not be seen by others."""
    return bool(_NAME.search(name) or _VALUE.search(value))


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with the values of tokens and passwords hidden; the program without its folder."""
    shown: list[str] = [Path(a).name for a in argv[:1]]
    for before, argument in pairwise(argv):
        name, equals, _ = argument.partition("=")
        if equals and _NAME.search(name):
            argument = f"{name}={_HIDDEN}"
        elif before.startswith("-") and "=" not in before and _NAME.search(before):
            argument = _HIDDEN
        shown.append(_VALUE.sub(_HIDDEN, argument))
    return shown
