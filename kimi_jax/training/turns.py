"""What process 0 does for all, such as filling a shared cache, the others find when it has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_jax.pods.session import Session

MARK = ".process-0-was-here-"


@contextmanager
def process_0_first(workdir: Path, session: Session) -> Iterator[None]:
    """The other processes enter when process 0 has left. They look for a file: a collective would not wait for hours.

    They do not wait in vain: the session ends them if process 0 dies.
    """
    ended = workdir / f"{MARK}{session.mark}"
    while session.process and not ended.exists():
        time.sleep(0.2)
    yield
    if session.processes > 1 and not session.process:
        for earlier in workdir.glob(f"{MARK}*"):
            earlier.unlink()
        ended.touch()
