"""In front of every request: keys, the size of the body, and one line in the access log, without any of its text."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kimi_jax.server.errors import ApiError, anthropic_error, openai_error
from kimi_jax.server.service import new_id

REQUEST_ID = (b"x-request-id", b"request-id")  # where OpenAI's clients look, and Anthropic's
OPEN = {"/", "/health", "/ready", "/metrics"}  # no key needed
log = logging.getLogger("kimi_jax.access")


@dataclass
class Record:
    """What the access log says of a request; the handler fills in what it knows."""

    id: str = field(default_factory=lambda: new_id("req_"))
    began: float = field(default_factory=time.perf_counter)
    status: int = 0  # stays 0 if the client went away first
    fields: dict[str, Any] = field(default_factory=dict)


def error_body(path: str, error: ApiError) -> dict[str, Any]:
    return anthropic_error(error) if path.startswith("/v1/messages") else openai_error(error)


class Keys:
    """Whether a request carries one of several keys; the time it takes says nothing about them."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def allow(self, headers: dict[bytes, bytes]) -> bool:
        if not self._digests:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        digest = hashlib.sha256(given).digest()
        return bool(given) and any([hmac.compare_digest(digest, known) for known in self._digests])  # all are compared


class Gate:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], max_body_bytes: int, on_answer: Callable[[str, int], None]):
        self._app, self._keys, self._limit, self._on_answer = app, Keys(keys), max_body_bytes, on_answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = Record()
        scope.setdefault("state", {})["record"] = record
        headers = dict(scope["headers"])
        started = False

        async def counted_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started, record.status = True, message["status"]
                named = [(name, record.id.encode()) for name in REQUEST_ID]
                message["headers"] = [*message.get("headers", []), *named]
            await send(message)

        try:
            if scope["path"] not in OPEN and not self._keys.allow(headers):
                raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
            length = headers.get(b"content-length", b"")
            if length.isdigit() and int(length) > self._limit:
                raise self._too_large()
            await self._app(scope, self._limited(receive), counted_send)
        except ApiError as error:
            if started:
                raise
            await _answer(counted_send, error_body(scope["path"], error), error.status)
        finally:
            self._write(scope, record)

    def _limited(self, receive: Receive) -> Receive:
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The request is larger than {self._limit} bytes.", code="request_too_large")

    def _write(self, scope: Scope, record: Record) -> None:
        route = scope.get("route")
        path = getattr(route, "path", None) or "unknown"
        self._on_answer(path, record.status)
        client = scope.get("client") or ("", 0)
        line = {"id": record.id, "method": scope["method"], "path": path, "status": record.status, "client": client[0]}
        line |= {"ms": round(1e3 * (time.perf_counter() - record.began), 1), **record.fields}
        log.info(json.dumps(line))


async def _answer(send: Send, body: dict[str, Any], status: int) -> None:
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})
