"""The engine against the full forward pass of each request alone."""

from __future__ import annotations

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.data.tokenizer import ByteTokenizer
from kimi_jax.errors import UserError
from kimi_jax.inference import step
from kimi_jax.inference.engine import Engine
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Event, Request, Sampling
from tests.inference import tiny
from tests.inference.tiny import CFG, full, parameters

PARAMS = parameters(CFG)
LIMITS = Limits(n_pages=7, page_size=16, max_len=80, vocab_size=CFG.vocab_size, max_rows=2, step_tokens=16)
RNG = np.random.default_rng(6)
PROMPTS = [RNG.integers(0, CFG.vocab_size, length).tolist() for length in (1, 33, 5, 60, 16, 2)]
PROMPTS += [PROMPTS[3][:40] + [1, 2], [3, 4, 5, 6] * 5]


def answers(events: list[Event]) -> dict[tuple[int, int], list[int]]:
    found: dict[tuple[int, int], list[int]] = {}
    for event in events:
        assert event.finish != "error", event.message
        found.setdefault((event.request, event.sample), []).extend(event.tokens)
    return found


@functools.cache
def greedy() -> list[list[int]]:
    """20 tokens for every prompt."""
    return tiny.greedy(PARAMS, CFG, PROMPTS, 20)


@pytest.mark.parametrize("draft", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_greedy_is_the_argmax_of_the_full_forward(draft):
    """Eight prompts on two rows that share and lack pages, in which others have left what is not finite."""
    engine = Engine(PARAMS, CFG, dataclasses.replace(LIMITS, draft=draft))
    pages, tokens = engine._runner._state
    engine._runner._state = step.State(jnp.full_like(pages, jnp.nan), tokens)
    found = answers(list(engine.generate(Request(prompt=tuple(p), max_tokens=20) for p in PROMPTS)))
    assert [found[i, 0] for i in range(len(PROMPTS))] == greedy()
    assert engine.load()[:3] == (0, 0, 0) and engine.load().preemptions > 0


def test_a_sampled_answer_does_not_depend_on_its_neighbours_or_on_drafts():
    sampling = Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=5)
    request = Request(prompt=tuple(PROMPTS[7]), sampling=sampling, max_tokens=20, n=2)
    alone = answers(list(Engine(PARAMS, CFG, LIMITS).generate([request])))
    assert alone[0, 0] != alone[0, 1]
    others = [
        Request(prompt=tuple(p), sampling=dataclasses.replace(sampling, seed=None), max_tokens=9) for p in PROMPTS
    ]
    for draft in (0, 3):
        engine = Engine(PARAMS, CFG, dataclasses.replace(LIMITS, draft=draft))
        found = answers(list(engine.generate([*others[:5], request, *others[5:]])))
        assert [found[5, 0], found[5, 1]] == [alone[0, 0], alone[0, 1]]


def test_logprobs_are_those_of_the_full_forward():
    sampling = Sampling(logprobs=3, prompt_logprobs=2)
    events = list(
        Engine(PARAMS, CFG, LIMITS).generate([Request(prompt=tuple(PROMPTS[1]), sampling=sampling, max_tokens=5)])
    )
    text = PROMPTS[1] + answers(events)[0, 0]
    expected = np.asarray(jax.nn.log_softmax(full(PARAMS, CFG, jnp.asarray([text]))[0]))
    scores = next(event.prompt_logprobs for event in events if event.prompt_logprobs)
    scores += tuple(score for event in events for score in event.logprobs)
    assert scores[0] is None and len(scores) == len(text)
    for i, score in enumerate(scores[1:], 1):
        assert score is not None
        np.testing.assert_allclose(score.logprob, expected[i - 1, text[i]], atol=2e-4)
        order = np.argsort(-expected[i - 1])[: 2 if i < 33 else 3]
        assert [token for token, _ in score.top] == order.tolist()
        np.testing.assert_allclose([value for _, value in score.top], expected[i - 1, order], atol=2e-4)


def test_nan_ends_its_own_request_and_reaches_no_other():
    params = {**PARAMS, "embedding": PARAMS["embedding"].at[60].set(jnp.nan)}
    bad = Request(prompt=(1, 60, 2), sampling=Sampling(prompt_logprobs=1), max_tokens=20, n=2)
    good = Request(prompt=tuple(PROMPTS[2]), max_tokens=6)
    events = list(Engine(params, CFG, LIMITS).generate([bad, good, bad, good]))
    ended = [event for event in events if event.request in (0, 2)]
    assert sorted((event.request, event.sample) for event in ended) == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert all(event.finish == "error" and "NaN" in str(event.message) for event in ended)
    found = answers([event for event in events if event.request in (1, 3)])
    assert found == {(1, 0): greedy()[2][:6], (3, 0): greedy()[2][:6]}


class Only:
    """Allows two tokens, in turn."""

    def __init__(self):
        self.n = 0

    def mask(self) -> np.ndarray:
        past_the_vocabulary = 7 << 29
        return np.array([0, 1 << (40 + self.n % 2) % 32 | past_the_vocabulary], np.uint32)

    def accept(self, token: int) -> None:
        self.n += 1


def test_penalties_bias_and_grammar_reach_the_device():
    prompt = tuple(PROMPTS[2])
    free, unlike, biased, forced = (
        Request(prompt=prompt, max_tokens=6, sampling=sampling, grammar=grammar)
        for sampling, grammar in [
            (Sampling(), None), (Sampling(presence_penalty=2.0, repetition_penalty=90.0), None),
            (Sampling(logit_bias={17: 100.0}), None), (Sampling(), Only),
        ]
    )  # fmt: skip
    engine = Engine(PARAMS, CFG, LIMITS)
    found = [answers(list(engine.generate([request])))[0, 0] for request in (free, unlike, biased, forced)]
    assert found[0] == greedy()[2][:6]
    assert len({*PROMPTS[2], *found[1]}) == len({*PROMPTS[2]}) + 6
    assert found[2] == [17] * 6 and found[3] == [40, 41] * 3


def test_other_threads_submit_and_cancel_while_one_steps():
    engine, ended, events = Engine(PARAMS, CFG, LIMITS), threading.Event(), []
    ids: list[int] = []

    def client() -> None:
        for prompt in PROMPTS * 2:
            ids.append(engine.submit(Request(prompt=tuple(prompt), max_tokens=20)))
        engine.cancel(ids[9])

    def serve() -> None:
        while not ended.is_set():
            if engine.wait(0.05):
                events.extend(engine.step())

    threads = [threading.Thread(target=client) for _ in range(2)]
    server = threading.Thread(target=serve)
    for thread in (server, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    while engine.load().running or engine.load().waiting:
        ended.wait(0.02)
    ended.set()
    server.join()
    events += engine.step()
    finish = {event.request: event.finish for event in events if event.finish}
    assert sorted(finish) == sorted(ids) == list(range(32))
    assert sum(reason == "length" for reason in finish.values()) >= 30


def test_a_failing_device_ends_what_runs_and_the_engine_goes_on(monkeypatch):
    engine = Engine(PARAMS, CFG, LIMITS)
    first = engine.submit(Request(prompt=(1, 2, 3), max_tokens=20))
    engine.step()
    engine.step()

    def fails(*_):
        raise RuntimeError("out of memory")

    old, empty = engine._runner._state.cache_LPGX, step.init_state

    def init_state(*args):
        assert old.is_deleted(), "the device has no room for two caches"
        return empty(*args)

    with monkeypatch.context() as patch:
        patch.setattr(step, "run", fails)
        patch.setattr(step, "init_state", init_state)
        (event,) = engine.step()
    assert (event.request, event.finish) == (first, "error") and "out of memory" in str(event.message)
    found = answers(list(engine.generate([Request(prompt=tuple(PROMPTS[2]), max_tokens=6)])))
    assert found[0, 0] == greedy()[2][:6]


def test_whoever_stops_listening_leaves_nothing_behind():
    engine, request = Engine(PARAMS, CFG, LIMITS), Request(prompt=(1, 2, 3), max_tokens=20)
    with pytest.raises(UserError):
        list(engine.generate([request, dataclasses.replace(request, max_tokens=1000)]))
    events = engine.generate([request] * 3)
    next(events)
    events.close()
    found = answers(list(engine.generate([request])))
    assert found == {(0, 0): tiny.greedy(PARAMS, CFG, [[1, 2, 3]], 20)[0]}
    assert engine.load()[:3] == (0, 0, 0)


def test_more_logprobs_than_tokens():
    """All of a small vocabulary, whose probabilities add up to 1."""
    cfg = CFG.replace(vocab_size=16)
    engine = Engine(parameters(cfg), cfg, dataclasses.replace(LIMITS, vocab_size=16))
    request = Request(prompt=(1, 2, 3), sampling=Sampling(logprobs=20), max_tokens=1)
    (logprob,) = [one for event in engine.generate([request]) for one in event.logprobs or ()]
    assert len(logprob.top) == 16 and sum(np.exp(p) for _, p in logprob.top) == pytest.approx(1, abs=1e-5)


def test_text_comes_with_a_tokenizer():
    sampling = Sampling(logit_bias={i: 100 for i in b"01"}, temperature=1.0, seed=1)
    request = Request(prompt=(1, 2), sampling=sampling, max_tokens=20)
    engine = Engine(PARAMS, CFG, LIMITS, ByteTokenizer())
    events = list(engine.generate([request, dataclasses.replace(request, stop=("01", "10"))]))
    text = ["".join(event.text for event in events if event.request == i) for i in range(2)]
    assert len(text[0]) == 20 and set(text[0]) == set("01")
    assert text[1] == text[0][: min(text[0].index("01"), text[0].index("10"))]


def test_limits_that_do_not_suit_the_model_are_refused():
    with pytest.raises(UserError, match="do not suit"):
        Engine(PARAMS, CFG, dataclasses.replace(LIMITS, vocab_size=7))
