"""Messages between processes: JSON objects, one a line, over TCP."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

Message = dict[str, Any]
LONGEST = 1 << 20  # bytes of a message; a stranger who sends more is no process of ours


class Line:
    """One connection. Sending never raises: that the other end is gone shows when reading."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._unread = b""
        self._sending = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def fileno(self) -> int:
        return self.socket.fileno()

    def send(self, message: Message) -> None:
        try:
            with self._sending:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            pass

    def read(self) -> list[Message]:
        """Waits for the next bytes; the messages that they complete. Raises OSError at the end of the connection."""
        data = self.socket.recv(1 << 16)
        *lines, self._unread = (self._unread + data).split(b"\n")
        if not data or len(self._unread) > LONGEST:
            raise ConnectionResetError
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError as error:
            raise ConnectionResetError from error
        if not all(isinstance(message, dict) for message in messages):
            raise ConnectionResetError
        return messages

    def next(self) -> Message:
        """Waits for one message. Raises OSError."""
        while True:
            if messages := self.read():
                return messages[0]

    def is_closed(self) -> bool:
        """Whether the other end has gone, with nothing left to read."""
        try:
            return not self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        self.socket.close()
