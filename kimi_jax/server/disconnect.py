"""A client that goes away takes its work with it, at once and not at the next token."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

T = TypeVar("T")


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; ClientDisconnect, and ``work`` cancelled, if the client goes first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events. When the last is sent or the client is gone, ``content`` is closed and ``on_end`` called."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncGenerator[bytes, None], on_end: Callable[[], None]):
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._content, self._on_end = content, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self.stream_response(send))
        except (ClientDisconnect, OSError):
            pass
        finally:
            try:
                await self._content.aclose()
            finally:
                self._on_end()
