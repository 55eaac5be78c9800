"""The processes of a run watch each other: when one dies, fails or hangs, all end, and each says which and why.

Every process keeps the connection to process 0 that the roll call made. Over it go heartbeats that say where a process
is; a closed connection is a death. Process 0 tells the others. JAX would notice too, but aborts without a clear line.
"""

from __future__ import annotations

import faulthandler
import math
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable

from kimi_jax.pods.roll_call import Present
from kimi_jax.pods.wire import Line, Message

SILENCE = 5.0  # seconds without a heartbeat that are worth mentioning
FAREWELL = 5.0  # seconds that a process that ends the run waits for the others to hear of it


def leave(line: str, stacks: bool = False) -> None:
    """Ends this process at once, without the clean-up at exit, in which JAX would wait for all processes."""
    sys.stdout.flush()
    if stacks:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    print(line, file=sys.stderr, flush=True)
    os._exit(1)


class Peers:
    """The other processes, watched by a thread from ``start`` to ``close``."""

    def __init__(self, prog: str, process: int, present: Present, heartbeat_seconds: float, end: Callable = leave):
        self.process, self.hosts = process, present.hosts
        self._prog, self._lines, self._patience, self._end = prog, dict(present.lines), heartbeat_seconds, end
        self._where = dict.fromkeys(range(len(self.hosts)), "the start")
        self._heard = dict.fromkeys(self._lines, time.monotonic())
        self._finished: set[int] = set()  # have said that they are done
        self._wanted: tuple[str, bool] | None = None  # the end that another thread asks for
        self._closed = threading.Event()
        self._selector = selectors.DefaultSelector()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        for process, line in self._lines.items():
            line.socket.settimeout(self._patience)
            self._selector.register(line, selectors.EVENT_READ, process)
        self._thread.start()

    def at(self, where: str) -> None:
        """Where this process is now: what the others read when it hangs."""
        self._where[self.process] = where

    def name(self, process: int) -> str:
        return f"process {process} ({self.hosts[process]})"

    def done(self) -> None:
        """This process has finished: it may go without being taken for dead."""
        self._tell({"done": True})

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        for line in self._lines.values():
            line.close()

    def fail(self, why: str) -> None:
        """Ends all processes because this one cannot go on."""
        self._ask_for_the_end(f"{self.name(self.process)}: {why}")

    def hang(self, what: str) -> None:
        """Ends all processes, with their stacks, because this one has waited for too long."""
        if self.process == 0:
            self._ask_for_the_end(f"{what}: {self._places()}", stacks=True)
            return
        self._tell({"hang": what})  # process 0 knows where all are, and tells
        if not self._closed.wait(FAREWELL):
            self._ask_for_the_end(f"{self.name(self.process)}: {what}; process 0 does not react", stacks=True)

    def _ask_for_the_end(self, why: str, stacks: bool = False) -> None:
        """The watching thread alone reads and ends; the first reason counts."""
        self._wanted = self._wanted or (why, stacks)
        if not self._closed.wait(3 * FAREWELL):
            self._end(f"{self._prog}: {why}", stacks)

    # The watching thread.

    def _watch(self) -> None:
        beat = min(1.0, self._patience / 4)
        while not self._closed.is_set():
            self._tell({"at": self._where[self.process]})
            if self._wanted:
                self._end_all(*self._wanted)
                return
            for key, _ in self._selector.select(beat):
                self._hear(key.data, self._lines[key.data])
            now = time.monotonic()
            for process in set(self._lines) - self._finished:
                if (silent := now - self._heard[process]) > self._patience:
                    self._end_all(f"{self.name(process)} has been silent for {silent:.0f} s")

    def _hear(self, process: int, line: Line) -> None:
        try:
            messages = line.read()
        except OSError:
            if process not in self._finished:
                self._end_all(f"{self.name(process)} died at {self._where[process]}")
            self._selector.unregister(line)
            del self._lines[process]
            return
        self._heard[process] = time.monotonic()
        for message in messages:
            if "end" in message:
                self._end_all(str(message["end"]), stacks=bool(message.get("stacks")), told_by=process)
            if "hang" in message:
                self._end_all(f"{message['hang']}: {self._places()}", stacks=True)
            if "done" in message:
                self._finished.add(process)
            self._where[process] = str(message.get("at", self._where[process]))

    def _places(self) -> str:
        """Who is where; first those who are not where most are."""
        by_place: dict[str, list[int]] = {}
        for process, where in self._where.items():
            silent = time.monotonic() - self._heard.get(process, math.inf)
            by_place.setdefault(f"{where} but silent" if silent > SILENCE else where, []).append(process)
        if len(by_place) == 1:
            return f"all processes are at {self._where[0]}, so look at the network between them"
        groups = sorted(by_place.items(), key=lambda group: len(group[1]))
        return "; ".join(
            f"{', '.join(map(self.name, there[:8]))}{', ...' if len(there) > 8 else ''} at {where}"
            for where, there in groups
        )

    def _tell(self, message: Message) -> None:
        for line in list(self._lines.values()):
            line.send(message)

    def _end_all(self, why: str, stacks: bool = False, told_by: int | None = None) -> None:
        """Tells all others and ends this process."""
        if told_by != 0:
            self._tell({"end": why, "stacks": stacks})
            self._farewell()
        self._end(f"{self._prog}: {why}", stacks)
        self._closed.set()

    def _farewell(self) -> None:
        """Waits until the others have heard: what they have not read yet would be lost with this process."""
        until = time.monotonic() + FAREWELL
        for line in list(self._lines.values()):
            try:
                while (left := until - time.monotonic()) > 0:
                    line.socket.settimeout(left)
                    if any("end" in message for message in line.read()) and self.process:
                        break
            except OSError:
                continue
