"""A command of ours in this process: its imports, which take seconds, are here already."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from types import ModuleType

from kimi_jax import cli


def run(module: ModuleType, *arguments: str) -> subprocess.CompletedProcess:
    """What ``python -m module`` does with bad arguments; good ones deserve a process of their own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before, sys.argv = sys.argv, [module.PROG, *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(module.PROG, module.main)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
        err.write("" if isinstance(stop.code, int) else f"{stop.code}\n")
    finally:
        sys.argv = before
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())
