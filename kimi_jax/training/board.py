"""Scalars for TensorBoard, written by whoever has them: on a full disk ``tensorboardX.SummaryWriter`` waits for ever.

It hands its events to a thread through a queue, and nobody empties that once an error has ended the thread.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

FLUSH_SECONDS = 120


class Board:
    """One file of events in ``folder``, of a run that goes on after step ``start``: what lies later is hidden."""

    def __init__(self, folder: Path, start: int):
        with _without_what_takes_seconds():
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
            from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        self._event, self._summary = Event, Summary
        folder.mkdir(exist_ok=True)
        self._file = EventsWriter(str(folder / "events"))
        begins = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(wall_time=time.time(), step=start + 1, session_log=begins))
        self.flush()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        found = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._summary(value=found)))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        self._file.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self._file.close()


@contextmanager
def _without_what_takes_seconds() -> Iterator[None]:
    """tensorboardX imports these, where they are installed: for tensors and remote folders."""
    hidden = [name for name in ("torch", "boto3", "google.cloud.storage") if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # pyright: ignore[reportArgumentType]  # an import says that there is none
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
