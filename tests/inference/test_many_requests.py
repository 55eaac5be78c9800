"""Two thousand random requests through the real engine, half of them with drafts, with too few pages and rows."""

from __future__ import annotations

import dataclasses
import itertools
import random
import threading
import time
from typing import NamedTuple

import numpy as np
import pytest

from kimi_jax.inference.engine import Engine
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Event, Request, Sampling
from tests.inference import tiny
from tests.inference.tiny import CFG, parameters

PARAMS = parameters(CFG)
LIMITS = Limits(
    n_pages=24, page_size=8, max_len=64, vocab_size=CFG.vocab_size, max_rows=8, step_tokens=64, max_wait_s=60, age_s=20
)  # by a clock that goes on when it is read, once a step and once a request
N_CLIENTS, N_EACH, MOST = 4, 250, 16


def prompts() -> list[list[int]]:
    """Many begin alike; some repeat themselves, so that drafts are made."""
    rng = np.random.default_rng(0)
    stems = [rng.integers(0, CFG.vocab_size, 30).tolist() for _ in range(6)] + [[1, 2, 3, 4, 5] * 6] * 2
    return [
        stems[rng.integers(len(stems))][: rng.integers(31)] + rng.integers(0, 61, rng.integers(1, 16)).tolist()
        for _ in range(160)
    ]


class Sent(NamedTuple):
    request: Request
    cancelled: bool


class Client(threading.Thread):
    """Sends requests, now slowly and now all at once, and cancels some."""

    def __init__(self, engine: Engine, prompts: list[list[int]], seed: int):
        super().__init__()
        self.engine, self.prompts, self.rng, self.sent = engine, prompts, random.Random(seed), dict[int, Sent]()

    def run(self) -> None:
        for i in range(N_EACH):
            while i % 100 > 30 and self.engine.load().waiting > 12:
                time.sleep(0.001)
            request = self.draw()
            id = self.engine.submit(request)
            to_cancel = [id] if self.rng.random() < 0.1 else []
            if self.sent and self.rng.random() < 0.1:
                to_cancel.append(self.rng.choice(list(self.sent)))
            self.sent[id] = Sent(request, False)
            for one in to_cancel:
                self.engine.cancel(one)
                self.sent[one] = self.sent[one]._replace(cancelled=True)

    def draw(self) -> Request:
        rng = self.rng
        drawn = Sampling(temperature=0.9, top_p=0.9, seed=rng.randrange(3))
        return Request(
            tuple(rng.choice(self.prompts)), rng.choice([Sampling(), Sampling(), drawn]), rng.randint(1, MOST),
            stop_ids=frozenset(rng.choice([(), (7, 11)])), n=rng.choice([1, 1, 1, 3]), priority=rng.choice([0, 0, 1]),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("draft", [0, 3])
def test_none_is_lost_or_answered_twice_and_greedy_answers_are_exact(draft):
    texts, gaps = tiny.greedy_and_gaps(PARAMS, CFG, prompts(), MOST)
    expected = {tuple(p): t for p, t, gap in zip(prompts(), texts, gaps, strict=True) if gap > 1e-4}
    assert len(expected) > 100
    steps = itertools.count()
    engine = Engine(PARAMS, CFG, dataclasses.replace(LIMITS, draft=draft), clock=lambda: float(next(steps)) / 2)
    clients = [Client(engine, [list(p) for p in expected], seed) for seed in range(N_CLIENTS)]
    events: list[Event] = []
    for client in clients:
        client.start()
    while engine.wait(0.05) or any(client.is_alive() for client in clients):
        events += engine.step()
    assert engine.load()[:3] == (0, 0, 0)

    sent = {id: one for client in clients for id, one in client.sent.items()}
    assert sorted(sent) == list(range(N_CLIENTS * N_EACH))
    tokens: dict[tuple[int, int], list[int]] = {(id, k): [] for id, one in sent.items() for k in range(one.request.n)}
    last: dict[tuple[int, int], Event] = {}
    for event in events:
        key = event.request, event.sample
        assert key not in last, "an event after the last one"
        tokens[key] += event.tokens
        if event.finish:
            last[key] = event
    assert set(last) == set(tokens)
    drawn: dict[tuple, list[int]] = {}
    for (id, k), found in tokens.items():
        (request, cancelled), end = sent[id], last[id, k]
        if end.finish == "error":
            assert "waited longer" in str(end.message) and not found
        text = expected[request.prompt]
        if request.sampling.temperature:  # the same draws whenever they are asked for
            key = request.prompt, request.sampling.seed, k
            text = max(drawn.get(key, []), found, key=len)
            assert text[: len(drawn.get(key, []))] == drawn.get(key, [])
            drawn[key] = text
        assert found == text[: len(found)]
        stopped = bool(found) and found[-1] in request.stop_ids
        assert not request.stop_ids & {*found[:-1]}
        assert end.finish != "cancelled" or cancelled
        assert (end.finish == "stop") == stopped and (end.finish == "length") <= (len(found) == request.max_tokens)
    finish = [event.finish for event in last.values()]
    counts = {reason: finish.count(reason) for reason in ("length", "stop", "cancelled", "error")}
    assert min(counts.values()) > 20, counts
    assert engine.load().preemptions > 50 and sum(event.cached_tokens > 0 for event in last.values()) > 100
