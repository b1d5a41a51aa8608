"""`python -m MODULE` as a fork of this process: a launcher and its ranks without the imports of each of them.

A command of `tests/processes.py` starts DeepSpeed's launcher with `subprocess.Popen`, and that one starts the ranks.
Here both are forks, with process ids, sessions, signals, environment and arguments of their own. Only `exec` is
missing: one test keeps it (`executes`).
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class ForkedPython(subprocess.Popen):
    """`subprocess.Popen`; a command of this interpreter that runs a module is forked."""

    def _execute_child(
        self,
        args: Any,
        executable: Any,
        preexec_fn: Callable[[], None] | None,
        close_fds: bool,
        pass_fds: Any,
        cwd: Any,
        env: Mapping[str, str] | None,
        *rest: Any,
    ) -> None:
        start_new_session = rest[-2]
        words = [] if isinstance(args, str) else [str(word) for word in args if word != "-u"]
        if words[:1] != [sys.executable] or words[1:2] != ["-m"]:
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            return
        try:
            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            code = _run_module(words[2:], dict(os.environ if env is None else env))
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)


def _run_module(words: Sequence[str], environment: dict[str, str]) -> int:
    """Run ``MODULE ARGUMENTS`` as the interpreter's main module would; its exit code."""
    atexit._clear()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = list(words)
    sys.modules.pop(words[0], None)  # runpy would warn
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)
