"""What looks like a token or a password, so that none is written down, shown, or put on a command line.

A configuration with credentials in a URL is refused, not masked in run.yaml: a run goes on from what stands there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

_HIDDEN = "***"
_NAME = re.compile(r"(?<![a-z])(token|password|passwd|secret|api[-_]?key)(?![a-z])", re.IGNORECASE)
_TOKEN = re.compile(r"\b(hf_|sk-|gh[pousr]_|github_pat_)[\w-]{8,}")
# A path of the system has one slash where the URL had two.
_USER = re.compile(r"(?<=:/)(/?)[^/\s]+(?=@)")
_QUERY = re.compile(
    r"([?&][\w.-]*(?:token|password|passwd|secret|api[-_]?key|signature|credential|sig)=)[^&\s'\"]+", re.IGNORECASE
)


def in_url(text: str) -> bool:
    """Whether the text has a URL with credentials: https://user:token@host, https://host/?token=..."""
    return any("://" in text and expression.search(text) for expression in (_USER, _QUERY))


def masked(text: str) -> str:
    """The text without the credentials of its URLs, for the screen."""
    return _QUERY.sub(rf"\1{_HIDDEN}", _USER.sub(rf"\1{_HIDDEN}", text)) if ":/" in text else text


def is_secret(name: str, value: str) -> bool:
    """Whether a variable called `name` with this value must not be seen by others."""
    return bool(_NAME.search(name) or _TOKEN.search(value) or in_url(value))


def without_secrets(argv: Sequence[str]) -> list[str]:
    """The command line with the values of tokens and passwords hidden; the program without its folder."""
    shown: list[str] = [Path(a).name for a in argv[:1]]
    for before, argument in pairwise(argv):
        name, equals, _ = argument.partition("=")
        if equals and _NAME.search(name):
            argument = f"{name}={_HIDDEN}"
        elif before.startswith("-") and "=" not in before and _NAME.search(before):
            argument = _HIDDEN
        shown.append(_TOKEN.sub(_HIDDEN, masked(argument)))
    return shown
