"""POST /v1/responses: the answer, whole or as a stream of numbered events."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from kimi_jax.server.answer import End, Part, Step
from kimi_jax.server.engine import Token
from kimi_jax.server.logprobs import chat_logprobs
from kimi_jax.server.responses import Dialogues, ResponsesRequest, items_of, job_of
from kimi_jax.server.service import Parts, Service, new_id, sse, validate
from kimi_jax.server.tool_parser import Arguments, CallEnd, CallStart, Event, Text


class ResponsesCall:
    """The output items grow as the events are made; the whole answer is what is left when they have all been made."""

    def __init__(self, body: Any, service: Service, dialogues: Dialogues):
        self.request = request = validate(ResponsesRequest, body)
        self.model = service.check_model(request.model)
        self.stream = bool(request.stream)
        self._items = items_of(request, dialogues)
        job, self._calls = job_of(request, self._items, service)
        self.jobs = [job]
        self._tokenizer, self._dialogues = service.tokenizer, dialogues
        self._id, self._created = new_id("resp_"), int(time.time())
        self._output: list[dict[str, Any]] = []
        self._unshown: list[Token] = []  # whose text has not come yet

    async def body(self, parts: Parts) -> dict[str, Any]:
        found = self._response("in_progress")
        async for _, response in self._run(parts):
            found = response.get("response", found)
        return found

    async def events(self, parts: Parts) -> AsyncIterator[bytes]:
        number = 0
        async for kind, fields in self._run(parts):
            yield sse({"type": kind, "sequence_number": number, **fields}, kind)
            number += 1

    async def _run(self, parts: Parts) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        yield "response.created", {"response": self._response("in_progress")}
        yield "response.in_progress", {"response": self._response("in_progress")}
        async for _, part in parts:
            if isinstance(part, End):
                for event in self._close("completed" if part.reason == "stop" else "incomplete"):
                    yield event
                status = "completed" if part.reason == "stop" else "incomplete"
                if self.request.store is not False:
                    self._dialogues.put(self._id, [*self._items, *self._output])
                yield f"response.{status}", {"response": self._response(status, part)}
            else:
                for event in self._events(part):
                    yield event

    def _events(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        if not isinstance(part, Step):
            return
        self._unshown += [token for token in part.tokens if token.id not in self.jobs[0].stop_ids]
        for event in part.events:
            if isinstance(event, Text) or self._calls:
                yield from self._event(event, self._unshown)
                self._unshown = []

    def _event(self, event: Event, tokens: Sequence[Token]) -> Iterator[tuple[str, dict[str, Any]]]:
        match event:
            case Text(text):
                if not self._output or self._output[-1]["type"] != "message":
                    yield from self._open_message()
                part = self._output[-1]["content"][0]
                part["text"] += text
                scores = self._scores(tokens)
                part["logprobs"] += scores
                yield "response.output_text.delta", {**self._place(0), "delta": text, "logprobs": scores}
            case CallStart(_, id_, name):
                yield from self._close("completed")
                item = {"type": "function_call", "id": new_id("fc_"), "call_id": id_, "name": name, "arguments": ""}
                yield from self._open({**item, "status": "in_progress"})
            case Arguments(_, text):
                self._output[-1]["arguments"] += text
                yield "response.function_call_arguments.delta", {**self._place(), "delta": text}
            case CallEnd():
                yield from self._close("completed")

    def _scores(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        if self.jobs[0].sampling.logprobs is None:
            return []
        return chat_logprobs(self._tokenizer, tokens)["content"]

    def _open_message(self) -> Iterator[tuple[str, dict[str, Any]]]:
        head = {"type": "message", "id": new_id("msg_"), "role": "assistant"}
        yield from self._open({**head, "status": "in_progress", "content": []})
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._output[-1]["content"].append(part)
        yield "response.content_part.added", {**self._place(0), "part": {**part, "logprobs": []}}

    def _open(self, item: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        self._output.append(item)
        snapshot = {**item, "content": []} if "content" in item else dict(item)
        yield "response.output_item.added", {"output_index": len(self._output) - 1, "item": snapshot}

    def _close(self, status: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Ends the item that is open, if one is."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            scored = {"text": part["text"], "logprobs": part["logprobs"]}
            yield "response.output_text.done", {**self._place(0), **scored}
            yield "response.content_part.done", {**self._place(0), "part": part}
        else:
            yield "response.function_call_arguments.done", {**self._place(), "arguments": item["arguments"]}
        yield "response.output_item.done", {"output_index": len(self._output) - 1, "item": item}

    def _place(self, content_index: int | None = None) -> dict[str, Any]:
        place = {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}
        return place if content_index is None else {**place, "content_index": content_index}

    def _response(self, status: str, end: End | None = None) -> dict[str, Any]:
        request = self.request
        prompt = len(self.jobs[0].prompt_ids)
        usage = end and {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": end.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": end.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + end.output_tokens,
        }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self.model,
            "output": list(self._output) if end else [],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": request.previous_response_id,
            "reasoning": {"effort": None, "summary": None},
            "store": request.store is not False,
            "temperature": self.jobs[0].sampling.temperature,
            "text": request.text or {"format": {"type": "text"}},
            "tool_choice": request.tool_choice or "auto",
            "tools": request.tools or [],
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": usage,
            "user": request.user,
        }
