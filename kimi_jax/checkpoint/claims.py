"""Who works on what, by files alone: a claim is held by one live process, and a dead one's is taken over.

On the same host a process is dead when its id is gone or belongs to a later one; on another host when its heartbeat is
older than a minute.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from kimi_jax.checkpoint import paths
from kimi_jax.errors import UserError

HEARTBEAT_S, SILENCE_S = 10.0, 60.0


class TakenError(UserError):
    """Another live process holds the claim."""


class Claim:
    """Holds the file ``path`` while its block runs. ``what`` names in messages what is claimed."""

    def __init__(self, path: paths.AnyPath, what: str):
        self._path, self._what = path, what
        pid = os.getpid()
        self._me = {"host": socket.gethostname(), "pid": pid, "began": _began(pid), "claim": time.time_ns()}
        self._stop = threading.Event()
        self._lost = False

    def __enter__(self) -> Claim:
        while not paths.create(self._path, self._text()):
            holder = _read(self._path)
            if holder is not None and _is_alive(holder):
                raise TakenError(
                    f"process {holder['pid']} on {holder['host']} is at work on {self._what}; "
                    "wait for it, or give this one another share"
                )
            paths.remove(self._path)
        self.check(settle=True)
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None):
        self._stop.set()
        self._thread.join()
        if self._is_mine():
            paths.remove(self._path)

    def check(self, settle: bool = False) -> None:
        """Raises if another process has taken the claim over, such as when this one was suspended for long."""
        if settle:  # two that take over a dead one's claim at once: the later file stays
            time.sleep(0.05)
            self._lost = not self._is_mine()
        if self._lost:
            raise TakenError(f"another process has taken over {self._what}; this one stops")

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            try:
                if not self._is_mine():
                    self._lost = True
                    return
                paths.write_text(self._path, self._text())
            except (OSError, UserError):  # a full disk stops the work itself, with a message
                continue

    def _text(self) -> str:
        return json.dumps({**self._me, "seen": time.time()})

    def _is_mine(self) -> bool:
        return {**(_read(self._path) or {}), "seen": None} == {**self._me, "seen": None}


def _read(path: paths.AnyPath) -> dict[str, Any] | None:
    """The holder; None if the file is gone or was never finished."""
    try:
        found = json.loads(paths.read_text(path))
        return found if {"host", "pid", "began", "seen"} <= found.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def _is_alive(holder: dict[str, Any]) -> bool:
    if holder["host"] != socket.gethostname():
        return time.time() - holder["seen"] < SILENCE_S
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return holder["began"] == _began(holder["pid"])


def _began(pid: int) -> str | None:
    """When the process began, in the system's own clock; "gone" for one that is dead and not yet buried."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux: the id alone decides
        return None
    return "gone" if fields[0] == "Z" else fields[19]
