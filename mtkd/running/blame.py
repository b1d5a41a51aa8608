"""Turn exceptions that pass through a plug-in's file into a message with file and line, and exit code 2."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from mtkd.errors import UserError
from mtkd.registry import as_text, loaded_files


@contextmanager
def plugin_errors() -> Iterator[None]:
    """Turn exceptions of a plug-in, `sys.exit` included, into a `UserError` that names its line.

    Raises:
        UserError: in place of an exception with a frame in a plug-in's file; others pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        place = _place(error)
        if place is None:
            raise
        raise UserError(
            f"a plug-in failed: {as_text(error)}", where=place, todo="correct it; `mtkd check FILE` runs its laws"
        ) from error


def _place(error: BaseException) -> str | None:
    """File and line of the innermost frame in a plug-in."""
    files = loaded_files()
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{frame.filename}:{frame.lineno}"
    return None
