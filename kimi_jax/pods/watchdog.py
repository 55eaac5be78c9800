"""A limit on how long one thing may take, kept by a thread: when it is exceeded, somebody is told."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

TICK = 1.0  # seconds


@dataclass
class Task:
    what: str
    limit: float
    waited: float = 0.0


class Watchdog:
    """``expect`` starts the time of one task, and ends that of the one before.

    Time is counted in ticks of the thread, so that a process that was stopped or a laptop that slept is not taken for
    one that hangs.
    """

    def __init__(self, on_hang: Callable[[str], None]):
        self._on_hang = on_hang
        self._task: Task | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def expect(self, what: str, seconds: float) -> None:
        self._task = Task(what, seconds)

    def rest(self) -> None:
        """Nothing is expected for now."""
        self._task = None

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(min(TICK, self._task.limit / 4 if self._task else TICK)):
            now = time.monotonic()
            task = self._task
            if task:
                task.waited += min(now - before, 2 * TICK)
                if task.waited > task.limit:
                    self._on_hang(f"{task.what} has not ended within {task.limit:.0f} s")
                    return
            before = now


class StepLimit:
    """How long the next step may take: ``seconds``, or if that is 0, 20 times the longest so far and at least 600.

    The first counts for nothing, for while some begin it, others still compile; and as a step is computed while the
    next is begun, 1800 are allowed until the second has ended.
    """

    FACTOR, LEAST, FIRST = 20, 600.0, 1800.0

    def __init__(self, seconds: float):
        self._seconds, self._steps, self._longest, self._began = seconds, 0, 0.0, 0.0

    def next(self) -> float:
        now = time.monotonic()
        if self._steps > 1:
            self._longest = max(self._longest, now - self._began)
        self._steps, self._began = self._steps + 1, now
        return self._seconds or max(self.LEAST if self._longest else self.FIRST, self.FACTOR * self._longest)
