"""POST /v1/messages, Anthropic's form: the answer, whole or as a stream."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from typing import Any

from kimi_jax.server.answer import End, Step
from kimi_jax.server.dialogue import prompt_ids
from kimi_jax.server.messages import CountRequest, MessagesRequest, dialogue_of, job_of
from kimi_jax.server.service import Parts, Service, new_id, sse, validate
from kimi_jax.server.tool_parser import Answer, Arguments, CallEnd, CallStart, Text


def count_tokens(body: Any, service: Service) -> dict[str, int]:
    request = validate(CountRequest, body)
    service.check_model(request.model)
    return {"input_tokens": len(prompt_ids(dialogue_of(request), service.tokenizer))}


class MessagesCall:
    def __init__(self, body: Any, service: Service):
        request = validate(MessagesRequest, body)
        self.model = service.check_model(request.model)
        self.stream = bool(request.stream)
        job, self._calls = job_of(request, service)
        self.jobs = [job]

    def _message(self, content: list, reason: str | None, stop: str | None, usage: dict[str, int]) -> dict[str, Any]:
        head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, "stop_reason": reason, "stop_sequence": stop, "usage": usage}

    def _usage(self, end: End | None = None) -> dict[str, int]:
        """The cached part of the prompt is counted apart."""
        cached = end.cached_tokens if end else 0
        return {
            "input_tokens": len(self.jobs[0].prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": end.output_tokens if end else 0,
        }

    async def body(self, parts: Parts) -> dict[str, Any]:
        answer, end = Answer(), None
        async for _, part in parts:
            if isinstance(part, Step):
                answer.add(part.events)
            elif isinstance(part, End):
                end = part
        assert end is not None
        calls = answer.calls if self._calls else []
        content: list[dict[str, Any]] = [{"type": "text", "text": answer.content}] if answer.content else []
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _object(call.arguments)} for call in calls
        ]
        return self._message(content, _reason(end, bool(calls)), end.stop, self._usage(end))

    async def events(self, parts: Parts) -> AsyncIterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:
            return sse({"type": kind, **fields}, kind)

        yield event("message_start", message=self._message([], None, None, self._usage()))
        yield event("ping")
        index, opened, calls = -1, None, Answer()
        async for _, part in parts:
            if isinstance(part, End):
                if opened:
                    yield event("content_block_stop", index=index)
                delta = {"stop_reason": _reason(part, calls.whole), "stop_sequence": part.stop}
                yield event("message_delta", delta=delta, usage=self._usage(part))
                yield event("message_stop")
            elif isinstance(part, Step):
                for one in part.events:
                    if not isinstance(one, Text) and not self._calls:
                        continue
                    calls.add([one])
                    block = _opens(one, opened)
                    if block:
                        if opened:
                            yield event("content_block_stop", index=index)
                        index, opened = index + 1, block["type"]
                        yield event("content_block_start", index=index, content_block=block)
                    if isinstance(one, Text):
                        yield event("content_block_delta", index=index, delta={"type": "text_delta", "text": one.text})
                    elif isinstance(one, Arguments):
                        delta = {"type": "input_json_delta", "partial_json": one.text}
                        yield event("content_block_delta", index=index, delta=delta)
                    elif isinstance(one, CallEnd):
                        yield event("content_block_stop", index=index)
                        opened = None


def _opens(event: object, opened: str | None) -> dict[str, Any] | None:
    """The block that begins with ``event``."""
    match event:
        case Text() if opened != "text":
            return {"type": "text", "text": ""}
        case CallStart(_, id_, name):
            return {"type": "tool_use", "id": id_, "name": name, "input": {}}
    return None


def _reason(end: End, calls: bool) -> str:
    if calls:
        return "tool_use"
    if end.stop is not None:
        return "stop_sequence"
    return "end_turn" if end.reason == "stop" else "max_tokens"


def _object(arguments: str) -> dict[str, Any]:
    """Arguments that were not held to their schema may be no object; then there are none."""
    try:
        value = json.loads(arguments, parse_float=_finite, parse_constant=_no_constant)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _finite(text: str) -> float:
    """The nearest double: the grammar of numbers knows no limit, and JSON no infinity."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
