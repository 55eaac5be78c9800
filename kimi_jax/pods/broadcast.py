"""Objects from process 0 to all others, in order, over TCP: what an engine on several processes is about to do."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener
from typing import Any

import numpy as np
from jax.experimental import multihost_utils

from kimi_jax.pods.session import Session

END = "end"


class Sender:
    """Of process 0, which waits for all others; of a single process, it sends to nobody."""

    def __init__(self, session: Session):
        self._others: list[Connection] = []
        if session.processes == 1:
            return
        with Listener(("", 0), backlog=session.processes, authkey=session.mark.encode()) as listener:
            multihost_utils.broadcast_one_to_all(np.int32(listener.address[1]))
            self._others = [listener.accept() for _ in range(session.processes - 1)]

    def send(self, message: Any) -> None:
        for other in self._others:
            other.send(message)

    def close(self) -> None:
        """The others' ``received`` ends."""
        self.send(END)
        for other in self._others:
            other.close()


def received(session: Session) -> Iterator[Any]:
    """On the other processes: what process 0 sends, until it closes."""
    port = int(multihost_utils.broadcast_one_to_all(np.int32(0)))
    with Client((session.host, port), authkey=session.mark.encode()) as line:
        while (message := line.recv()) is None or not isinstance(message, str):
            yield message
