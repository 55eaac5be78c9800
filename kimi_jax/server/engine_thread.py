"""An inference engine on a thread of its own, as the asynchronous engine that the server asks for."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from kimi_jax.inference import request as inference
from kimi_jax.server.engine import Event, Finished, Job, Load, PromptScores, Token
from kimi_jax.server.errors import ApiError

_IDLE_SECONDS = 0.1
log = logging.getLogger("kimi_jax.server")


class StepEngine(Protocol):
    """What ``kimi_jax.inference.engine.Engine`` offers."""

    def submit(self, request: inference.Request, /) -> int: ...
    def cancel(self, id: int, /) -> None: ...
    def wait(self, timeout_s: float | None, /) -> bool: ...
    def step(self) -> list[inference.Event]: ...
    def load(self) -> Load: ...


class EngineThread:
    """``with EngineThread(engine, ...)``: one thread takes the steps, events go to the loop that waits for them."""

    def __init__(self, engine: StepEngine, vocab_size: int, max_model_len: int):
        self.vocab_size, self.max_model_len = vocab_size, max_model_len
        self._engine = engine
        self._inboxes: dict[int, _Inbox] = {}
        self._lock = threading.Lock()  # so that no event comes before its inbox is known
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def load(self) -> Load:
        self._check()
        return self._engine.load()

    async def generate(self, job: Job) -> AsyncGenerator[tuple[int, Event], None]:
        inbox, left = _Inbox(), job.n
        with self._lock:
            self._check()
            id = self._engine.submit(_request(job))
            self._inboxes[id] = inbox
        try:
            while left:
                for event in await inbox.take():
                    left -= event.finish is not None
                    for one in _events(event, job.prompt_ids):
                        yield event.sample, one
        finally:
            with self._lock:
                del self._inboxes[id]
            if left:
                self._engine.cancel(id)

    def _check(self) -> None:
        if self._stopping.is_set():
            raise ApiError(503, "The engine has stopped.")

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                if self._engine.wait(_IDLE_SECONDS):
                    self._deliver(self._engine.step())
        except Exception:
            log.exception("the engine has stopped")
        with self._lock:
            self._stopping.set()
            left = list(self._inboxes)
        self._deliver([inference.Event(id, 0, finish="error", message="The engine has stopped.") for id in left])

    def _deliver(self, events: list[inference.Event]) -> None:
        """One call into each loop, however many events there are."""
        found = defaultdict(list)
        with self._lock:
            for event in events:
                if inbox := self._inboxes.get(event.request):
                    found[inbox.loop].append((inbox, event))
        for loop, pairs in found.items():
            loop.call_soon_threadsafe(_put, pairs)


class _Inbox:
    """The events of one request that nobody has taken yet."""

    def __init__(self):
        self.loop = asyncio.get_running_loop()
        self._events: list[inference.Event] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, event: inference.Event) -> None:
        self._events.append(event)
        if self._waiter and not self._waiter.done():
            self._waiter.set_result(None)

    async def take(self) -> list[inference.Event]:
        """All there are, at least one."""
        if not self._events:
            self._waiter = self.loop.create_future()
            await self._waiter
        events, self._events = self._events, []
        return events


def _put(pairs: list[tuple[_Inbox, inference.Event]]) -> None:
    for inbox, event in pairs:
        inbox.put(event)


def _request(job: Job) -> inference.Request:
    return inference.Request(
        tuple(job.prompt_ids), job.sampling, job.max_tokens, job.stop_ids, n=job.n, grammar=job.constraint
    )


def _events(event: inference.Event, prompt_ids: Sequence[int]) -> list[Event]:
    found: list[Event] = []
    if event.prompt_logprobs:
        scored = zip(prompt_ids, event.prompt_logprobs, strict=True)
        found.append(PromptScores(tuple(Token(i, s.logprob, s.top) if s else Token(i) for i, s in scored)))
    scores = event.logprobs or (None,) * len(event.tokens)
    found += [Token(i, s.logprob, s.top) if s else Token(i) for i, s in zip(event.tokens, scores, strict=True)]
    if event.finish is None:
        return found
    if event.finish in ("error", "cancelled"):
        raise ApiError(503, event.message or "The request was cancelled.")
    return [*found, Finished("stop" if event.finish == "stop" else "length", event.cached_tokens)]
