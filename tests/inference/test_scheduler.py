"""Random requests on a simulated device: every one is answered once, with the tokens it gets alone."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kimi_jax.errors import UserError
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Request, Sampling
from kimi_jax.inference.scheduler import Scheduler
from tests.inference.simulation import Device, alone, logprob
from tests.inference.workload import LIMITS, VOCAB, Job, NoRepeats, answers, assert_right, request, serve

STEMS = [[random.Random(i).randrange(VOCAB) for _ in range(18)] for i in range(3)]


@st.composite
def requests(draw) -> Request:
    stem = draw(st.sampled_from(STEMS))
    tail = draw(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9))
    penalty = st.sampled_from([0.0, 0.0, 0.5])
    grammar = draw(st.sampled_from([None, None, None, 1, 4, 30]))
    return Request(
        prompt=tuple(stem[: draw(st.integers(0, len(stem)))] + tail),
        sampling=Sampling(
            temperature=draw(st.sampled_from([0.0, 0.5])), top_k=draw(st.integers(0, 2)),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 2.0])), presence_penalty=draw(penalty),
            frequency_penalty=draw(penalty), seed=draw(st.integers(0, 2)),
            logit_bias=draw(st.sampled_from([{}, {}, {2: 1.5, 4: -2.0}])),
        ),
        max_tokens=draw(st.one_of(st.none(), st.integers(1, 20))),
        stop_ids=frozenset(draw(st.sampled_from([(), (), (), (1,)]))),
        n=draw(st.sampled_from([1, 1, 1, 2, 3])), priority=draw(st.integers(-1, 1)),
        grammar=None if grammar is None else lambda: NoRepeats(grammar),
    )  # fmt: skip


@st.composite
def workloads(draw) -> tuple[Limits, list[Job]]:
    page_size = draw(st.sampled_from([1, 2, 4, 7]))
    max_rows = draw(st.integers(1, 7))
    limits = Limits(
        n_pages=1 + -(-draw(st.integers(48, 90)) // page_size), page_size=page_size, max_len=draw(st.integers(48, 64)),
        vocab_size=VOCAB, max_rows=max_rows, step_tokens=draw(st.integers(max(max_rows, 5), 40)),
        shards=draw(st.sampled_from([1, 1, 2, 3, 4])),
        draft=draw(st.sampled_from([0, 0, 1, 4])), age_s=draw(st.sampled_from([0.5, 20])),
    )  # fmt: skip
    jobs = []
    for _ in range(draw(st.integers(1, 9))):
        at = draw(st.integers(0, 12))
        jobs.append(Job(at, draw(requests()), at + draw(st.sampled_from([float("inf")] * 4 + [0, 1, 3, 9]))))
    return limits, jobs


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(workloads(), st.sampled_from(["when it can", "never", "always", "at random"]))
def test_every_answer_is_that_of_the_request_alone(workload, ahead):
    limits, jobs = workload
    rng = random.Random(0)
    choose = {
        "when it can": lambda scheduler: scheduler.runs_ahead,
        "never": lambda scheduler: False,
        "always": lambda scheduler: True,
        "at random": lambda scheduler: rng.random() < 0.5,
    }[ahead]
    assert_right(serve(limits, jobs, choose), jobs, limits)


def random_request(rng: random.Random) -> Request:
    stem = rng.choice(STEMS)
    length = rng.randrange(1, 30)
    return Request(
        prompt=tuple(stem[: rng.randrange(19)] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]),
        sampling=Sampling(seed=rng.randrange(3), presence_penalty=rng.choice([0.0, 0.0, 0.0, 0.5])),
        max_tokens=rng.randrange(1, 30), stop_ids=frozenset(rng.choice([(), (), (1,)])), n=rng.choice([1, 1, 1, 1, 3]),
        priority=rng.choice([0, 0, 0, 1, 2]), grammar=rng.choice([None] * 5 + [lambda: NoRepeats(length)]),
    )  # fmt: skip


def random_jobs(n: int, every: float) -> list[Job]:
    rng = random.Random(n)
    ats = [every * rng.randrange(n) for _ in range(n)]
    return [Job(at, random_request(rng), at + rng.choice([float("inf")] * 5 + [rng.randrange(90)])) for at in ats]


@pytest.mark.parametrize("draft, shards", [(0, 1), (3, 1), (0, 2), (0, 3), (3, 4)])
def test_a_thousand_requests_under_page_pressure(draft, shards):
    limits = dataclasses.replace(LIMITS, draft=draft, shards=shards, n_pages=1 + max(16, 39 // shards))
    jobs = random_jobs(1000, every=4)
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    ended = [event for event in run.events if event.finish]
    assert run.scheduler.preemptions > 100 and sum(event.cached_tokens > 0 for event in ended) > 100
    assert sum(event.finish == "cancelled" for event in ended) > 50
    assert (run.device.accepted > 500) == bool(draft)
    assert {shard for seen in run.homes.values() for shard in seen} == set(range(shards))
    assert (sum(len(seen) > 1 for seen in run.homes.values()) > 20) == (shards > 1)
    assert any((plan.feed_B >= 0).any() for plan in run.plans) == (not draft)


@pytest.mark.parametrize("shards", [1, 3])
def test_the_same_calls_give_the_same_plans(shards):
    jobs = random_jobs(60, every=2)
    limits = dataclasses.replace(LIMITS, shards=shards)
    first, second = serve(limits, jobs), serve(limits, jobs)
    assert first.events == second.events and len(first.plans) == len(second.plans)
    for one, other in zip(first.plans, second.plans, strict=True):
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ahead", [True, False])
def test_a_request_takes_no_step_more_than_it_needs(ahead):
    run = serve(LIMITS, [Job(0, request([1] * 40, 6))], lambda scheduler: ahead)
    assert [plan.tokens_BT.shape for plan in run.plans] == [(1, 32), (1, 16), *[(1, 1)] * 5]
    assert [int(plan.feed_B[0]) for plan in run.plans] == [-1, -1, *[0 if ahead else -1] * 5]


def test_decoding_goes_on_while_a_long_prompt_is_read():
    """At most one step between two tokens of the first request."""
    limits = dataclasses.replace(LIMITS, max_len=150, n_pages=80)
    jobs = [Job(0, request([1, 2], 12)), Job(2, request([3] * 140, 2))]
    run = serve(limits, jobs, lambda scheduler: False)
    assert_right(run, jobs, limits)
    kinds = "".join("d" if plan.tokens_BT.shape[1] == 1 else "p" for plan in run.plans)
    assert "ppp" not in kinds and "pdpdpdpd" in kinds


def test_the_widths_of_a_prefill_step_get_the_most_done():
    """32 tokens: one row of 32, two of 16; a chunk is never narrower than 16."""
    rows = [[1] * 40, [2] * 12, [3] * 12]
    run = serve(LIMITS, [Job(0, request(prompt, 1)) for prompt in rows])
    assert [plan.length_B.tolist() for plan in run.plans] == [[32], [8, 12], [12]]


def test_priority_takes_rows_and_pages_from_those_behind():
    limits = dataclasses.replace(LIMITS, max_rows=2)
    jobs = [Job(0, request([i] * 9, 20)) for i in range(2)] + [Job(4, request([4] * 9, 3, priority=1))]
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    assert [event.request for event in run.events if event.finish] == [2, 0, 1]
    assert run.scheduler.preemptions == 1


def test_a_low_priority_waits_only_so_long():
    """One row. Requests of priority 1 come all the time; those of less than age_s = 5 s later go first."""
    limits = dataclasses.replace(LIMITS, max_rows=1)
    jobs = [Job(0, request([4], 3))] + [Job(0.5 + i, request([i % 4], 3, priority=1)) for i in range(20)]
    order = [event.request for event in serve(limits, jobs).events if event.finish]
    assert order.index(0) == 4


def test_n_samples_share_the_pages_of_the_prompt():
    jobs = [Job(0, request([1, 2, 3] * 7, 3, n=3, sampling=Sampling(seed=1, temperature=1.0)))]
    run = serve(LIMITS, jobs)
    assert_right(run, jobs, LIMITS)
    tables = [plan.pages_BP for plan in run.plans if plan.tokens_BT.shape[1] == 1 and plan.length_B.sum() >= 2]
    shared, own = tables[-1][:2, :5], tables[-1][:2, 5]
    assert (shared[0] == shared[1]).all() and own[0] != own[1]
    assert len({tuple(tokens) for tokens, _ in answers(run, jobs).values()}) == 3


def test_a_conversation_finds_its_past_but_never_its_last_token():
    """The first answer's tokens are found too. Of a prompt that is cached whole, one page is computed again."""
    first = request([1, 2, 3, 4, 0, 0], 7)
    past = first.prompt + tuple(alone(first, 0, VOCAB, 64))
    jobs = [Job(0, first), Job(30, request(past[:12], 1)), Job(60, request((*past, 1, 1), 1))]
    found = {event.request: event.cached_tokens for event in serve(LIMITS, jobs).events if event.finish}
    assert found == {0: 0, 1: 8, 2: 12}


def test_cancelling_frees_pages_at_once():
    scheduler, device = Scheduler(LIMITS), Device(LIMITS)
    ids = [scheduler.submit(request([i] * 20, 9, n=2), 0) for i in range(3)]
    result = device.run(scheduler.plan(0))  # in flight
    used = scheduler.load().pages_used
    for n, id in enumerate(ids):
        scheduler.cancel(id)
        scheduler.cancel(id)
        assert scheduler.load().pages_used == used * (2 - n) / 3
    scheduler.cancel(99)
    scheduler.commit(result)
    assert scheduler.idle and scheduler.plan(0) is None
    events = scheduler.take_events()
    assert [(event.request, event.sample, event.finish) for event in events] == [
        (id, sample, "cancelled") for id in ids for sample in range(2)
    ]


def test_what_waits_too_long_is_refused():
    limits = dataclasses.replace(LIMITS, max_rows=1, max_wait_s=10)
    jobs = [Job(0, request([1] * 5, 30)), Job(1, request([2] * 5, 4, n=2)), Job(25, request([3] * 5, 4))]
    run = serve(limits, jobs, lambda scheduler: False)
    ended = {(event.request, event.sample): event for event in run.events if event.finish}
    assert {key: event.finish for key, event in ended.items()} == {
        (0, 0): "length", (1, 0): "error", (1, 1): "error", (2, 0): "length",
    }  # fmt: skip
    assert "10 s" in str(ended[1, 0].message)


def test_what_can_start_at_once_has_not_waited_too_long():
    scheduler = Scheduler(dataclasses.replace(LIMITS, max_wait_s=0))
    scheduler.submit(request([1] * 5, 4), 1.0)
    assert scheduler.plan(2.0) is not None and not scheduler.take_events()


def test_a_device_that_fails_ends_every_request_and_the_scheduler_goes_on():
    scheduler, device = Scheduler(LIMITS), Device(LIMITS)
    for i in range(8):
        scheduler.submit(request([i % 5] * 9, 9), 0)
    device.run(scheduler.plan(0))
    scheduler.abort("the device is gone")
    events = scheduler.take_events()
    assert [event.finish for event in events] == ["error"] * 8
    assert scheduler.idle and scheduler.load()[:3] == (0, 0, 0)
    scheduler.submit(request([1] * 9, 2), 0)
    plan = scheduler.plan(1)
    assert plan is not None and plan.length_B.sum() == 9  # nothing is taken from a cache that is lost


class Breaks(NoRepeats):
    def accept(self, token: int) -> None:
        super().accept(token)
        if self.left == 2:
            raise RuntimeError("no such state")


def test_a_grammar_that_fails_ends_its_own_request():
    jobs = [Job(0, request([1], 9, grammar=lambda: Breaks(5))), Job(0, request([2], 9))]
    run = serve(LIMITS, jobs)
    ended = {event.request: event for event in run.events if event.finish}
    assert ended[0].finish == "error" and "no such state" in str(ended[0].message)
    assert ended[1].finish == "length"


def test_drafts_are_penalised_before_anything_was_generated():
    """A chunk leaves one token of the prompt, whose step has drafts behind it and nobody beside it."""
    limits = dataclasses.replace(LIMITS, draft=3)
    for seed in range(20):
        penalised = Sampling(seed=seed, presence_penalty=0.5)
        jobs = [Job(0, request([1, 2] * 16 + [1], 8, sampling=penalised))]
        assert_right(serve(limits, jobs), jobs, limits)


@pytest.mark.parametrize("max_tokens, n, size", [(0, 1, 40), (3, 2, 40), (0, 1, 1)])
def test_the_prompt_is_scored_once(max_tokens, n, size):
    """In chunks, after other requests have left its pages in the cache, and preempted in the middle."""
    prompt = [i % 3 for i in range(size)]
    scored = request(prompt, max_tokens, n=n, sampling=Sampling(seed=0, logprobs=0, prompt_logprobs=0))
    jobs = [Job(0, request(prompt, 1)), Job(9, scored), Job(10, request([4] * 50, 9, priority=9))]
    limits = dataclasses.replace(LIMITS, max_rows=1)
    run = serve(limits, jobs)
    events = [event for event in run.events if event.request == 1]
    assert sum(bool(event.prompt_logprobs) for event in events) == 1
    scores = next(event.prompt_logprobs for event in events if event.prompt_logprobs)
    assert scores[0] is None and len(scores) == size
    assert [score.logprob for score in scores[1:]] == [logprob(prompt[:i], prompt[i]) for i in range(1, size)]
    for sample in range(n):
        own = [event for event in events if event.sample == sample]
        tokens = [token for event in own for token in event.tokens]
        assert tokens == alone(scored, sample, VOCAB, 64) and own[-1].finish == "length"
        text = prompt + tokens
        found = [score.logprob for event in own for score in event.logprobs]
        assert found == [logprob(text[:i], text[i]) for i in range(size, len(text))]


REFUSED = {
    "prompt: token ids must be less than 5": request([1, 5]),
    "stop_ids: token ids must be less than 5": request([1], stop_ids=frozenset([7])),
    "logit_bias: token ids must be less than 5": request([1], sampling=Sampling(logit_bias={9: 1.0})),
    "stop: there is no tokenizer": request([1], stop=("x",)),
    "more than max_len, 64": request([1] * 60, 5),
    "grammar allows no first token": request([1], grammar=lambda: NoRepeats(0)),
    r"grammar: a mask must have shape \(1,\)": request([1], grammar=type("G", (), {"mask": lambda s: np.ones(2)})),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_can_never_be_served_is_refused_on_entry(message):
    scheduler = Scheduler(LIMITS)
    with pytest.raises(UserError, match=message):
        scheduler.submit(REFUSED[message], 0)
    assert scheduler.idle


def test_the_longest_sequence_that_fits_the_cache_is_served():
    limits = dataclasses.replace(LIMITS, n_pages=8)  # 28 tokens, and one that is sampled last
    with pytest.raises(UserError, match="the cache holds 28"):
        Scheduler(limits).submit(request([1] * 20, 10), 0)
    jobs = [Job(0, request([1] * 20, 9)), Job(0, request([2] * 20, None))]
    run = serve(limits, jobs)
    assert_right(run, jobs, limits)
    assert [len(tokens) for tokens, _ in answers(run, jobs).values()] == [9, 9]


class Letters:
    """Text for the tokens of the simulation."""

    def feed(self, token: int) -> str:
        return "abcde"[token]

    def finish(self) -> str:
        return "."


def test_text_ends_before_a_stop_string_and_tokens_with_it():
    tokens = alone(request([3, 1], 12), 0, VOCAB, 64)
    text = "".join("abcde"[t] for t in tokens)
    stop = text[5:8]
    end = text.index(stop)
    scheduler, device = Scheduler(dataclasses.replace(LIMITS, draft=2), Letters), Device(LIMITS)
    for stops in ((stop,), ("never",)):
        scheduler.submit(request([3, 1], 12, stop=stops), 0)
    while not scheduler.idle:
        scheduler.commit(device.run(scheduler.plan(0)))
    events = scheduler.take_events()
    first, second = ([event for event in events if event.request == id] for id in range(2))
    assert "".join(event.text for event in first) == text[:end]
    assert (first[-1].finish, first[-1].stopped_by) == ("stop", stop)
    assert [t for event in first for t in event.tokens] == tokens[: end + 3]
    assert "".join(event.text for event in second) == text + "."
    assert (second[-1].finish, second[-1].stopped_by) == ("length", None)


def test_without_a_seed_requests_differ_and_a_scheduler_repeats_itself():
    def draws() -> list[int]:
        scheduler = Scheduler(LIMITS, seed=7)
        for _ in range(2):
            scheduler.submit(Request(prompt=(1, 2), max_tokens=1), 0)
        plan = scheduler.plan(0)
        assert plan is not None
        return plan.seed_B.tolist()

    assert len(set(draws())) == 2 and draws() == draws()
