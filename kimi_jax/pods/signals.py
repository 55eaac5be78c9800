"""What signals ask of a run: SIGTERM to save and stop, SIGUSR1 to trace the next steps."""

from __future__ import annotations

import signal
from types import TracebackType


class Signals:
    """Notes them while entered; the loop looks when it suits."""

    def __init__(self):
        self.stop = False
        self.trace = False

    def __enter__(self) -> Signals:
        self._before = {
            signal.SIGTERM: signal.signal(signal.SIGTERM, self._on_stop),
            signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._on_trace),
        }
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_stop(self, *_) -> None:
        self.stop = True

    def _on_trace(self, *_) -> None:
        self.trace = True
