"""Serves an application until a signal, then lets what has begun come to its end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from kimi_jax.errors import UserError

DRAIN_SECONDS = 60


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.config.app.state.server.draining = True  # type: ignore[union-attr]
        super().handle_exit(sig, frame)


def check_free(host: str, port: int) -> None:
    """UserError if nobody can listen there, before minutes are spent on the weights."""
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, port), family=family).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None


def serve(app: FastAPI, host: str = "127.0.0.1", port: int = 8000, drain_seconds: int = DRAIN_SECONDS) -> None:
    """Blocks. One line of JSON per request goes to standard error, by way of the logger kimi_jax.access."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    access = logging.getLogger("kimi_jax.access")
    access.addHandler(handler)
    access.setLevel(logging.INFO)
    access.propagate = False
    config = uvicorn.Config(
        app,
        host,
        port,
        access_log=False,
        log_level="info",
        timeout_graceful_shutdown=drain_seconds,
        server_header=False,
    )
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn raises what it was told once more when it is done
    try:
        _Server(config).run()
    finally:
        signal.signal(signal.SIGTERM, before)
