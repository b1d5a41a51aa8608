"""Errors that a user can cause. Each has the exit code of the command line and says what fixes it."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_NON_FINITE = 64
EXIT_INTERNAL = 70
EXIT_LOST = 71
EXIT_PREEMPTED = 75


class UserError(Exception):
    """Something the user can fix: where it is, what was found, what is allowed, what to do.

    Args:
        message: what is wrong, one sentence.
        where: place in the configuration or on disk, e.g. ``stages.student.match[2].loss``.
        found: the offending value, shown with ``repr`` (strings given as they are).
        allowed: what would have been accepted.
        todo: the next thing to do.
    Attributes:
        shared: every rank of the run raises it; one per node writes it.
        line: file and line of `where` (`mtkd.planning.places`); "" where it is not known.
        used_by: of a place on disk: the block of the configuration that names it, "" for none.
    """

    exit_code = EXIT_USAGE
    shared = False

    def __init__(
        self, message: str, *, where: str = "", found: object = None, allowed: object = None, todo: str = ""
    ) -> None:
        self.message, self.where, self.found, self.allowed, self.todo = message, where, found, allowed, todo
        self.line = self.used_by = ""
        super().__init__(message)

    def __str__(self) -> str:
        text = ": ".join(filter(None, (self.line, self.where.removeprefix("@"), self.message)))
        if self.found is not None:
            text += f"\n  found:   {self.found if isinstance(self.found, str) else repr(self.found)}"
        if self.allowed is not None:
            allowed = self.allowed
            text += f"\n  allowed: {allowed if isinstance(allowed, str) else ', '.join(map(str, _listed(allowed)))}"
        if self.used_by:
            text += f"\n  used by: {self.used_by}"
        if self.todo:
            text += f"\n  do:      {self.todo}"
        return masked(text)


class DataError(UserError):
    """The data or a model on disk is not what the configuration says it is (exit code 3)."""

    exit_code = EXIT_DATA


class NonFiniteError(UserError):
    """Training produced NaN or infinity several steps in a row (exit code 64)."""

    exit_code = EXIT_NON_FINITE


class Preempted(UserError):
    """A signal stopped the run, which saved a sealed checkpoint first (exit code 75)."""

    exit_code = EXIT_PREEMPTED


class Stopped(BaseException):
    """A signal ends the process outside of training. No `except Exception` may take it for a failure (exit code 75)."""

    exit_code = EXIT_PREEMPTED


class LostRank(UserError):
    """Another process of the run failed, died or froze.

    Args:
        code: exit code: that of the process that failed, or 71.
    """

    def __init__(self, message: str, *, code: int = EXIT_LOST, where: str = "", todo: str = "") -> None:
        super().__init__(message, where=where, todo=todo)
        self.exit_code = code


Shared = TypeVar("Shared", bound=UserError)


def on_every_rank(error: Shared) -> Shared:
    """The error, marked as one that every rank raises."""
    error.shared = True
    return error


def tell(text: str) -> None:
    """Write text and its line end to the error stream in one piece. Ranks share it, and `print` writes twice."""
    sys.stderr.write(masked(text) + "\n")
    sys.stderr.flush()


def what_is(path: Path) -> str:
    """Say what a path is that is no file. Reading some of these would wait, or go on, for ever."""
    kinds = {
        "a folder": path.is_dir(),
        "a pipe (fifo): reading it could wait for ever": path.is_fifo(),
        "a socket": path.is_socket(),
        "a device": path.is_char_device() or path.is_block_device(),
    }
    return next((kind for kind, true in kinds.items() if true), "neither a file nor a folder")


def nearest(name: str, choices: Iterable[str]) -> str:
    """The sentence "did you mean 'x'?" for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"did you mean '{close[0]}'?" if close else ""


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, Iterable) else [value]


class LawBroken(AssertionError):
    """A loss or weighting does not keep a law.

    Attributes:
        law: the law's name, e.g. "padding".
        name: of the loss or weighting.
        found: what it did instead.
    """

    def __init__(self, law: str, name: str, found: str) -> None:
        super().__init__(f"'{name}' breaks the law '{law}': {found}")
        self.law, self.name, self.found = law, name, found


# What looks like a token or a password is not written to disk, shown, or put on a command line. A configuration with
# credentials in a URL is refused, not masked: a run resumes from run.yaml, so that must hold the true values.

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
