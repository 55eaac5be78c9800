"""How far a long job is: bytes, rate, time left and peak memory; at the end a JSON report."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_jax.checkpoint import paths
from kimi_jax.errors import os_errors_as

EVERY_S = 10.0  # between two lines where there is no terminal


class Reporter:
    """Counts bytes; a bar on a terminal, elsewhere a line every few seconds. May be used by several threads."""

    def __init__(self, what: str, total: int):
        self._what, self._total, self.bytes = what, total, 0
        self.began = self._said = time.monotonic()
        self._lock = threading.Lock()
        self._bar = tqdm(total=total, desc=what, unit="B", unit_scale=True) if sys.stderr.isatty() else None

    def add(self, n: int) -> None:
        with self._lock:
            self.bytes += n
            now = time.monotonic()
            if self._bar is not None:
                self._bar.update(n)
                self._bar.set_postfix_str(f"peak {gib(peak_rss())}", refresh=False)
            elif now - self._said > EVERY_S:
                self._said = now
                print(self._line(now), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def _line(self, now: float) -> str:
        rate = self.bytes / max(now - self.began, 1e-9)
        left = (self._total - self.bytes) / max(rate, 1e-9)
        done = f"{self._what}: {gib(self.bytes)} of {gib(self._total)} ({self.bytes / max(self._total, 1):.0%})"
        return f"{done}, {rate / 1e6:,.0f} MB/s, {left:,.0f} s left, peak memory {gib(peak_rss())}"


def peak_rss() -> int:
    """Bytes of memory that this process has held at most."""
    try:
        return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024
    except (OSError, IndexError):  # elsewhere a child may start with its parent's figure
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gib(n: float) -> str:
    return f"{n / 2**30:,.2f} GiB" if n >= 2**28 else f"{n / 2**20:,.2f} MiB"


def check(path: paths.AnyPath) -> None:
    """Raises ``UserError`` if ``write`` could not write there."""
    if paths.is_remote(path):
        return
    with os_errors_as(f"the report cannot be written to {path}"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        tempfile.TemporaryFile(dir=Path(path).parent).close()


def write(path: paths.AnyPath, report: dict[str, Any]) -> None:
    with os_errors_as(f"the report cannot be written to {path}"):
        paths.write_text(path, json.dumps(report, indent=2) + "\n")
