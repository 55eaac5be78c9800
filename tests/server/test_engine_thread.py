"""The engine's thread: events reach who asked, cancelling and errors do too."""

import asyncio
import contextlib
import threading

import pytest

from kimi_jax.errors import UserError
from kimi_jax.inference.request import Event, Logprob
from kimi_jax.server.engine import Finished, Job, Load, PromptScores, Sampling, Token
from kimi_jax.server.engine_thread import EngineThread
from kimi_jax.server.errors import ApiError


class Counter:
    """Continues [.., n] with n + 1, n + 2, ..; two tokens a step, stop ids and limits observed."""

    def __init__(self):
        self.work = threading.Condition()
        self.live, self.cancelled, self.requests, self.n = {}, [], [], 0

    def submit(self, request):
        if request.prompt[0] == 666:
            raise UserError("too long")
        with self.work:
            self.requests.append(request)
            self.live[self.n] = [request, 0]
            self.n += 1
            self.work.notify_all()
            return self.n - 1

    def cancel(self, id):
        with self.work:
            self.cancelled.append(id)
            self.live.pop(id, None)

    def wait(self, timeout):
        with self.work:
            return self.work.wait_for(lambda: bool(self.live), timeout)

    def load(self):
        return Load(len(self.live), 1, 2, 3, 0)

    def step(self):
        with self.work:
            return [event for id in list(self.live) for event in self.advance(id)]

    def advance(self, id):
        request, done = self.live[id]
        if request.prompt[0] == 13:
            del self.live[id]
            return [Event(id, 0, finish="error", message="lost the device")]
        tokens, finish = [], None
        while len(tokens) < 2 and not finish:
            tokens.append(request.prompt[-1] + done + 1)
            done += 1
            finish = "stop" if tokens[-1] in request.stop_ids else "length" if done == request.max_tokens else None
        self.live[id][1] = done
        if finish:
            del self.live[id]
        scored = request.sampling.logprobs is not None
        logprobs = tuple(Logprob(-float(t), ((t, -float(t)),)) for t in tokens) if scored else ()
        first = done <= 2 and request.sampling.prompt_logprobs is not None
        prompt = (None, *(Logprob(-float(t), ()) for t in request.prompt[1:])) if first else ()
        event = Event(id, 0, tuple(tokens), "", logprobs, prompt, finish, cached_tokens=5 if finish else 0)
        return [event._replace(sample=i) for i in range(request.n)]


async def collect(engine, *job, **more):
    return [event async for _, event in engine.generate(Job(*job, **more))]


@pytest.fixture
def counter():
    return Counter()


@pytest.fixture
def engine(counter):
    with EngineThread(counter, 1000, 100) as engine:
        yield engine


def test_many_at_once(engine):
    async def run():
        return await asyncio.gather(*(collect(engine, [10 * i], 5) for i in range(50)))

    for i, events in enumerate(asyncio.run(run())):
        assert events == [*(Token(10 * i + k) for k in range(1, 6)), Finished("length", 5)]
    assert engine._inboxes == {}


def test_scores_stops_and_parameters(engine, counter):
    constraint = object()
    events = asyncio.run(
        collect(
            engine,
            [7, 8],
            9,
            Sampling(logprobs=1, prompt_logprobs=0, temperature=0.5, top_k=3, seed=4, logit_bias={1: 2.0}),
            frozenset({10}),
            constraint,
        )
    )
    assert events == [
        PromptScores((Token(7), Token(8, -8.0))),
        *(Token(9, -9.0, ((9, -9.0),)), Token(10, -10.0, ((10, -10.0),))),
        Finished("stop", 5),
    ]
    request = counter.requests[0]
    assert (request.sampling.temperature, request.sampling.top_k, request.sampling.seed) == (0.5, 3, 4)
    assert request.grammar is constraint and request.sampling.logit_bias == {1: 2.0}


def test_several_answers_to_one_request(engine, counter):
    async def run():
        return [item async for item in engine.generate(Job([7], 3, n=2))]

    found = asyncio.run(run())
    for sample in (0, 1):
        assert [event for i, event in found if i == sample] == [Token(8), Token(9), Token(10), Finished("length", 5)]
    assert [request.n for request in counter.requests] == [2] and counter.cancelled == []


def test_closing_cancels(engine, counter):
    async def run():
        async with contextlib.aclosing(engine.generate(Job([1], 10**6))) as events:
            async for _ in events:
                break

    asyncio.run(run())
    assert counter.cancelled == [0] and engine._inboxes == {}


def test_errors_reach_who_asked(engine):
    with pytest.raises(ApiError, match="lost the device"):
        asyncio.run(collect(engine, [13], 5))
    with pytest.raises(UserError, match="too long"):
        asyncio.run(collect(engine, [666], 5))
    assert engine.load().waiting == 1


def test_an_engine_that_breaks_leaves_nobody_waiting(engine, counter):
    def broken():
        raise RuntimeError("bug")

    async def run():
        events = engine.generate(Job([1], 10**6))
        await anext(events)
        counter.step = broken
        async for _ in events:
            pass

    with pytest.raises(ApiError, match="has stopped"):
        asyncio.run(run())
    engine._thread.join(5)
    with pytest.raises(ApiError, match="has stopped"):
        asyncio.run(collect(engine, [1], 1))
    with pytest.raises(ApiError, match="has stopped"):
        engine.load()


def test_a_constraint_is_absent_unless_given(engine, counter):
    asyncio.run(collect(engine, [1], 1))
    assert counter.requests[0].grammar is None
