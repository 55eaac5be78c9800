"""Tokens to an answer: whole characters, tool calls, stop texts, and why it ended."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kimi_jax.data.detokenizer import Detokenizer
from kimi_jax.data.tokenizer import Tokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference.stops import StopStrings
from kimi_jax.server.engine import Engine, FinishReason, Job, PromptScores, Token
from kimi_jax.server.errors import ApiError
from kimi_jax.server.tool_parser import MARKERS, Event, Text, ToolParser


class Step(NamedTuple):
    """What one token brought. ``tokens`` may hold several, or none at the end, when held-back text is released."""

    events: Sequence[Event]
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
        self._cuts = bool(stops)

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
        if not self._cuts:
            return list(events)
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
        space = self._parser.withheld if self._parser else ""
        if space and self._stops.would_meet(space) and (text := self._stops.feed(space)):
            found.append(Text(text))
        return found


async def generate(
    engine: Engine, tokenizer: Tokenizer, job: Job, first: int = 0
) -> AsyncGenerator[tuple[int, Part], None]:
    """The parts of the job's answers with their numbers, counted from ``first``; an answer's last is ``End``.

    Closing the iterator cancels the engine's work.
    """
    running = {i: _Answer(Reader(tokenizer, job.stops, job.parse)) for i in range(job.n)}
    if job.max_tokens == 0 and job.sampling.prompt_logprobs is None:
        for i in running:
            yield first + i, End("length", None, 0, 0)
        return
    async with contextlib.aclosing(engine.generate(job)) as events:
        async for i, event in events:
            if isinstance(event, PromptScores):
                for number in running:
                    yield first + number, event
                continue
            answer = running.get(i)
            if answer is None:  # a stop text was met; the engine does not know
                continue
            end = None
            if isinstance(event, Token):
                answer.count += 1
                stop = event.id in job.stop_ids
                yield first + i, Step(() if stop else answer.reader.feed(event.id), (event,))
                if answer.reader.met:
                    end = End("stop", answer.reader.met, answer.count, 0)
            else:
                if rest := answer.reader.finish():
                    yield first + i, Step(rest)
                met = answer.reader.met
                end = End("stop" if met else event.reason, met, answer.count, event.cached_tokens)
            if end:
                del running[i]
                yield first + i, end
                if not running:
                    return


@dataclass
class _Answer:
    reader: Reader
    count: int = 0


async def generate_all(
    engine: Engine, tokenizer: Tokenizer, jobs: Sequence[Job]
) -> AsyncGenerator[tuple[int, Part], None]:
    """The parts of all jobs as they come, the answers numbered in their order. An error in one ends all."""
    firsts = [sum(job.n for job in jobs[:i]) for i in range(len(jobs))]
    if len(jobs) == 1:
        async with contextlib.aclosing(generate(engine, tokenizer, jobs[0])) as parts:
            async for numbered in parts:
                yield numbered
        return
    queue: asyncio.Queue[tuple[int, Part] | Exception | None] = asyncio.Queue(maxsize=4 * len(jobs))

    async def run(job: Job, first: int) -> None:
        try:
            async with contextlib.aclosing(generate(engine, tokenizer, job, first)) as parts:
                async for numbered in parts:
                    await queue.put(numbered)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(run(job, first)) for job, first in zip(jobs, firsts, strict=True)]
    try:
        left = len(jobs)
        while left:
            found = await queue.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
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
