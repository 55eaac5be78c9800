"""Tokens to an answer: whole characters, tool calls, stop texts, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.stops import StopStrings
from kimi_jax.server.engine import Constraint, Engine, Finished, FinishReason, PromptScores, Sampling, Token
from kimi_jax.server.errors import ApiError
from kimi_jax.server.tool_parser import MARKERS, Event, Text, ToolParser


@dataclass(frozen=True)
class Job:
    """One answer to generate."""

    prompt_ids: Sequence[int]
    sampling: Sampling
    constraint: Callable[[], Constraint | None] = lambda: None
    stops: tuple[str, ...] = ()
    parse: bool = True  # tool markers and calls out of the text; else the markers stay


@dataclass(frozen=True)
class Step:
    """What one token brought. ``tokens`` may hold several, or none at the end, when held-back text is released."""

    events: tuple[Event, ...]
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class End:
    reason: FinishReason
    stop: str | None  # the stop text that was met
    output_tokens: int
    cached_tokens: int


Part = PromptScores | Step | End


class Reader:
    """One answer's tokens to events. After a stop text (``met``) no more tokens are wanted."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), parse: bool = True):
        self._markers = {tokenizer.special_ids[name]: name for name in MARKERS} if parse else {}
        self._text = Detokenizer(tokenizer, keep=() if parse else MARKERS)
        self._parser = ToolParser() if parse else None
        self._stops = StopStrings(stops)

    @property
    def met(self) -> str | None:
        return self._stops.met

    def feed(self, token: int) -> list[Event]:
        marker = self._markers.get(token)
        events = self._parsed(self._text.feed(token))
        if marker and self._parser:
            events += self._cut(self._parser.feed(marker, control=True))
        return events

    def finish(self) -> list[Event]:
        if self.met:
            return []
        events = self._parsed(self._text.finish())
        if self._parser:
            events += self._cut(self._parser.finish())
        rest = "" if self.met else self._stops.finish()
        return events + [Text(rest)] * bool(rest)

    def _parsed(self, text: str) -> list[Event]:
        if not text:
            return []
        return self._cut(self._parser.feed(text) if self._parser else [Text(text)])

    def _cut(self, events: Sequence[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            if self.met:
                break
            if not isinstance(event, Text):
                if rest := self._stops.finish():
                    found.append(Text(rest))
                found.append(event)
            elif text := self._stops.feed(event.text):
                found.append(Text(text))
        return found


async def generate(engine: Engine, tokenizer: Tokenizer, job: Job) -> AsyncGenerator[Part, None]:
    """The parts of one answer; ``End`` is the last. Closing the iterator cancels the engine's work."""
    if job.sampling.max_tokens == 0 and job.sampling.prompt_logprobs is None:
        yield End("length", None, 0, 0)
        return
    reader = Reader(tokenizer, job.stops, job.parse)
    reason, cached, count = "length", 0, 0
    sampling = dataclasses.replace(job.sampling, constraint=job.constraint())
    async with contextlib.aclosing(engine.generate(job.prompt_ids, sampling)) as events:
        async for event in events:
            match event:
                case PromptScores():
                    yield event
                case Finished():
                    reason, cached = event.reason, event.cached_tokens
                case Token():
                    count += 1
                    stop = event.id in sampling.stop_ids
                    yield Step(tuple([] if stop else reader.feed(event.id)), (event,))
                    if reader.met:
                        reason = "stop"
                        break
    if rest := reader.finish():
        yield Step(tuple(rest))
    yield End("stop" if reader.met else reason, reader.met, count, cached)


async def generate_all(
    engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, Part], None]:
    """The parts of all jobs as they come, with the job's index. An error in one ends all."""
    if len(jobs) == 1:
        async with contextlib.aclosing(generate(engine, tokenizer, jobs[0])) as parts:
            async for part in parts:
                yield 0, part
        return
    queue: asyncio.Queue[tuple[int, Part | Exception]] = asyncio.Queue(maxsize=4 * len(jobs))

    async def run(index: int) -> None:
        try:
            async with contextlib.aclosing(generate(engine, tokenizer, jobs[index])) as parts:
                async for part in parts:
                    await queue.put((index, part))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(run(i)) for i in range(len(jobs))]
    try:
        left = len(jobs)
        while left:
            index, part = await queue.get()
            if isinstance(part, Exception):
                raise part
            left -= isinstance(part, End)
            yield index, part
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error in the middle of an answer."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    return ApiError(500, "The server had an error while it processed your request.")
