"""`python -m MODULE` and `python FILE` as forks of this process: launchers and ranks that import nothing again.

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
from pathlib import Path
from typing import Any


class ForkedPython(subprocess.Popen):
    """`subprocess.Popen`; a command of this interpreter that runs a module or a file is forked."""

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
        words = [] if isinstance(args, str) else [str(word) for word in args if word != "-u"]
        if words[:1] != [sys.executable] or words[1] == "-c":
            super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
            return
        pipes, start_new_session = rest[3:9], rest[-2]
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self.pid = os.fork()
        if self.pid:
            self._child_created = True
            self._close_pipe_fds(*pipes)
            return
        try:
            for number, end in enumerate((pipes[0], pipes[3], pipes[5])):
                if end != -1:
                    os.dup2(end, number)
            if start_new_session:
                os.setsid()
            if preexec_fn is not None:
                preexec_fn()
            os.chdir(cwd or ".")
            code = _run(words[1:], dict(os.environ if env is None else env))
        except BaseException:
            traceback.print_exc()
            code = 1
        os._exit(code)


def run_main(words: Sequence[str]) -> None:
    """Run ``-m MODULE ARGUMENTS``, or ``FILE ARGUMENTS``, as the interpreter does."""
    if words[0] != "-m":
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
        return
    sys.argv = list(words[1:])
    if not hasattr(sys.modules.get(words[1]), "__path__"):
        sys.modules.pop(words[1], None)  # runpy would warn
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _run(words: Sequence[str], environment: dict[str, str]) -> int:
    """The exit code of an interpreter with these arguments."""
    atexit._clear()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    try:
        run_main(words)
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
