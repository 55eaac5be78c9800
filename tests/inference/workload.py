"""Jobs for a scheduler on the simulated device, and what has to be right about their answers."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import numpy as np

from kimi_jax.inference.limits import Limits
from kimi_jax.inference.plan import StepPlan
from kimi_jax.inference.request import Event, Request, Sampling
from kimi_jax.inference.scheduler import Scheduler
from tests.inference.simulation import Device, alone

VOCAB = 5
LIMITS = Limits(n_pages=40, page_size=4, max_len=64, vocab_size=VOCAB, max_rows=6, step_tokens=32, age_s=5)


class NoRepeats:
    """No token twice in a row, and the end after ``length`` tokens."""

    def __init__(self, length: int):
        self.left, self.last = length, -1

    def mask(self) -> np.ndarray:
        past_the_vocabulary = 2**32 - 2**VOCAB  # bits that must not matter
        allowed = sum(1 << t for t in range(VOCAB) if self.left and t != self.last)
        return np.array([past_the_vocabulary | allowed], np.uint32)

    def accept(self, token: int) -> None:
        assert self.left and token != self.last, "a token that the mask forbids"
        self.left, self.last = self.left - 1, token


class Job(NamedTuple):
    at: float
    request: Request
    cancel_at: float = float("inf")


class Run(NamedTuple):
    events: list[Event]
    plans: list[StepPlan]
    scheduler: Scheduler
    device: Device
    homes: dict[tuple[int, int], list[int]]  # the shards of every continuation, one after the other


def serve(limits: Limits, jobs: list[Job], choose=lambda scheduler: scheduler.runs_ahead) -> Run:
    """``choose`` says at every step whether the next is planned before the last one's tokens are known."""
    scheduler, device = Scheduler(limits), Device(limits)
    events, plans, flight, now = [], [], deque(), 0.0
    left = sorted(enumerate(jobs), key=lambda item: item[1].at)
    cancels = sorted((job.cancel_at, i) for i, job in enumerate(jobs) if job.cancel_at < float("inf"))
    ids: dict[int, int] = {}
    homes: dict[tuple[int, int], list[int]] = {}
    while left or not scheduler.idle:
        while left and left[0][1].at <= now:
            index, job = left.pop(0)
            ids[index] = scheduler.submit(job.request, now)
        while cancels and cancels[0][0] <= now:
            _, index = cancels.pop(0)
            if index in ids:
                scheduler.cancel(ids[index])
        if not choose(scheduler):
            while flight:
                scheduler.commit(flight.popleft())
        before = set(scheduler._running), set(scheduler._waiting), scheduler.preemptions
        plan = scheduler.plan(now)
        if plan is not None:
            plans.append(plan)
            flight.append(device.run(plan))
        check(scheduler, device, *before)
        for s in scheduler._running:
            seen = homes.setdefault((s.id, s.sample), [s.shard])
            assert s.shard == seen[-1] or scheduler.preemptions > before[-1] or s not in before[0], "moved in its run"
            seen += [s.shard] * (s.shard != seen[-1])
        assert plan is not None or flight or left or scheduler.idle, "nothing moves"
        while len(flight) > (plan is not None):
            scheduler.commit(flight.popleft())
        events += scheduler.take_events()
        now += 1
    assert scheduler.load()[:3] == (0, 0, 0)
    named = {id: index for index, id in ids.items()}
    events = [event._replace(request=named[event.request]) for event in events]
    return Run(events, plans, scheduler, device, {(named[id], i): seen for (id, i), seen in homes.items()})


def check(scheduler: Scheduler, device: Device, running: set, waiting: set, preemptions: int) -> None:
    """What holds after every plan; before it, these sequences ran and these waited."""
    limits = scheduler.limits
    started = [s for s in scheduler._running if s not in running]
    passed = [w for w in scheduler._waiting if w in waiting or limits.shards == 1]
    assert not any(w.rank < s.rank for s in started for w in passed), "the queue was jumped"
    everyone = scheduler._running + scheduler._waiting
    first = min(everyone, key=lambda s: s.rank, default=None)
    assert first is None or first.running or first.steps, "the first in rank stands still"
    assert len(scheduler._running) <= limits.max_rows
    assert all(not s.pages for s in scheduler._waiting)
    assert sorted(s.rank for shard in scheduler._shards for s in shard.running) == [s.rank for s in scheduler._running]
    for i, shard in enumerate(scheduler._shards):
        held = [page for s in shard.running for page in s.pages]
        assert shard.pool.in_use == len(set(held)) and 0 not in held
        assert len(shard.running) <= -(-limits.max_rows // limits.shards)
        for s in shard.running:
            assert s.shard == i
            shared = device.cache_SPG[i, s.pages[: s.published]].reshape(-1).tolist()
            assert shared == s.tokens[: len(shared)], "shared before it is computed"
            others = {page for other in shard.running if other is not s for page in other.pages}
            assert not others & set(s.pages[s.published :]), "shared while it is written"
    head = scheduler._waiting[0] if scheduler._waiting else None
    undisturbed = scheduler.preemptions == preemptions and len(scheduler._running) < limits.max_rows
    if head and head in waiting and not head.steps and undisturbed:
        need = limits.pages_for(len(head.tokens))
        for shard in scheduler._shards:
            has_row = len(shard.running) < -(-limits.max_rows // limits.shards)
            assert not has_row or shard.pool.available < need + len(shard.running), "waits though there is room"


def answers(run: Run, jobs: list[Job]) -> dict[tuple[int, int], tuple[list[int], str]]:
    """Tokens and finish of every continuation; each ends exactly once."""
    tokens: dict[tuple[int, int], list[int]] = {}
    ends: dict[tuple[int, int], str] = {}
    for event in run.events:
        key = event.request, event.sample
        assert key not in ends, "an event after the last one"
        tokens.setdefault(key, []).extend(event.tokens)
        if event.finish:
            ends[key] = event.finish
    assert set(ends) == {(i, k) for i, job in enumerate(jobs) for k in range(job.request.n)}
    return {key: (tokens.get(key, []), ends[key]) for key in ends}


def assert_right(run: Run, jobs: list[Job], limits: Limits) -> None:
    for (i, k), (tokens, finish) in answers(run, jobs).items():
        job = jobs[i]
        expected = alone(job.request, k, VOCAB, limits.most_tokens)
        if finish == "cancelled":
            assert job.cancel_at < float("inf") and tokens == expected[: len(tokens)]
            continue
        assert tokens == expected
        stopped = bool(tokens) and tokens[-1] in job.request.stop_ids
        full = len(tokens) == (job.request.max_tokens or limits.most_tokens - len(job.request.prompt))
        assert finish == ("stop" if stopped or not full else "length")


def request(prompt, max_tokens=4, **what) -> Request:
    what.setdefault("sampling", Sampling(seed=0))
    return Request(prompt=tuple(prompt), max_tokens=max_tokens, **what)
