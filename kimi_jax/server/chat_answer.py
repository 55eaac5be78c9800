"""POST /v1/chat/completions: the answer, whole or as a stream."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kimi_jax.server.answer import End, Step
from kimi_jax.server.chat import ChatRequest, job_of
from kimi_jax.server.engine import Job, Token
from kimi_jax.server.logprobs import chat_logprobs
from kimi_jax.server.service import Parts, Service, new_id, sse, validate
from kimi_jax.server.tool_parser import Answer, Arguments, CallStart, Event, Text


@dataclass
class Choice:
    """What one answer has come to."""

    answer: Answer = field(default_factory=Answer)
    tokens: list[Token] = field(default_factory=list)
    end: End | None = None


def usage(job: Job, ends: Sequence[End]) -> dict[str, Any]:
    prompt, output = len(job.prompt_ids), sum(end.output_tokens for end in ends)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": output,
        "total_tokens": prompt + output,
        "prompt_tokens_details": {"cached_tokens": max((end.cached_tokens for end in ends), default=0)},
    }


class ChatCall:
    def __init__(self, body: Any, service: Service):
        self.request = validate(ChatRequest, body)
        self.model = service.check_model(self.request.model)
        self.job, self._calls = job_of(self.request, service)
        self.jobs = [self.job]
        self.stream = bool(self.request.stream)
        self._tokenizer = service.tokenizer
        self._head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": self.model}

    async def body(self, parts: Parts) -> dict[str, Any]:
        choices = [Choice() for _ in range(self.job.n)]
        async for index, part in parts:
            choice = choices[index]
            if isinstance(part, Step):
                choice.answer.add(part.events)
                choice.tokens += part.tokens
            elif isinstance(part, End):
                choice.end = part
        found = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": usage(self.job, [choice.end for choice in choices if choice.end]),
            "system_fingerprint": None,
        }
        if self.request.return_token_ids:
            found["prompt_token_ids"] = list(self.job.prompt_ids)
        return found

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.end is not None
        calls = choice.answer.calls if self._calls else []
        content = choice.answer.content
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message["refusal"] = None
        if calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in calls
            ]
        reason = "tool_calls" if calls else choice.end.reason
        return {"index": index, "message": message, **self._scores(choice.tokens), "finish_reason": reason}

    def _scores(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """With token ids, the scores are of every token, the stop token too; else of those that are text or calls."""
        found: dict[str, Any] = {"logprobs": None}
        if self.request.logprobs:
            stops = frozenset() if self.request.return_token_ids else self.job.stop_ids
            found["logprobs"] = chat_logprobs(self._tokenizer, [token for token in tokens if token.id not in stops])
        if self.request.return_token_ids:
            found["token_ids"] = [token.id for token in tokens]
        return found

    async def events(self, parts: Parts) -> AsyncIterator[bytes]:
        options = self.request.stream_options
        count = bool(options and options.include_usage)
        for index in range(self.job.n):
            first = self._chunk(index, {"role": "assistant", "content": ""}, count=count)
            if self.request.return_token_ids:
                first["prompt_token_ids"] = list(self.job.prompt_ids)
            yield sse(first)
        answers = [Answer() for _ in range(self.job.n)]
        ends = []
        async for index, part in parts:
            if isinstance(part, Step):
                answers[index].add(part.events)
                deltas = [delta for event in part.events if (delta := self._delta(event))]
                tokens = part.tokens if self.request.logprobs or self.request.return_token_ids else ()
                for delta in deltas or ([{}] if tokens else []):
                    yield sse(self._chunk(index, delta, tokens, count=count))
                    tokens = ()
            elif isinstance(part, End):
                ends.append(part)
                yield sse(self._chunk(index, {}, reason=self._reason(answers[index], part), count=count))
        if count:
            head = {**self._head, "object": "chat.completion.chunk", "system_fingerprint": None}
            yield sse({**head, "choices": [], "usage": usage(self.job, ends)})
        yield sse("[DONE]")

    def _reason(self, answer: Answer, end: End) -> str:
        """A call that the token limit cut off has been sent as far as it came: only "length" says so."""
        return "tool_calls" if self._calls and answer.whole else end.reason

    def _delta(self, event: Event) -> dict[str, Any] | None:
        match event:
            case Text(text):
                return {"content": text}
            case CallStart(index, id_, name) if self._calls:
                function = {"name": name, "arguments": ""}
                return {"tool_calls": [{"index": index, "id": id_, "type": "function", "function": function}]}
            case Arguments(index, text) if self._calls:
                return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
        return None

    def _chunk(
        self, index: int, delta: dict, tokens: Sequence[Token] = (), reason: str | None = None, count: bool = False
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        if tokens:
            choice |= self._scores(tokens)
        chunk = {**self._head, "object": "chat.completion.chunk", "system_fingerprint": None, "choices": [choice]}
        return {**chunk, "usage": None} if count else chunk
