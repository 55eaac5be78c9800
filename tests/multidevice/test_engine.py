"""The engine on eight devices against one: the same tokens and log probabilities, and pages of its own on each."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from kimi_jax.inference.engine import Engine
from kimi_jax.inference.limits import Limits
from kimi_jax.inference.request import Request, Sampling
from kimi_jax.inference.sharded import serving_mesh
from kimi_jax.inference.weights import abstract, held, serving_params
from tests import tiny
from tests.inference.tiny import parameters

CFG = tiny.CFG.replace(num_attention_heads=8, n_routed_experts=16)
SHAPES = {
    "every axis divides": CFG,
    "no axis divides": CFG.replace(num_attention_heads=3, n_routed_experts=6, intermediate_size=21, q_lora_rank=None),
}
LIMITS = Limits(n_pages=7, page_size=16, max_len=80, vocab_size=CFG.vocab_size, max_rows=4, step_tokens=16)
RNG = np.random.default_rng(3)
GREEDY = Sampling(logprobs=3, prompt_logprobs=2, repetition_penalty=1.2, logit_bias={5: 2.0})
DRAWN = dataclasses.replace(GREEDY, temperature=0.9, top_p=0.9, top_k=12, seed=7)
REQUESTS = [
    Request(tuple(RNG.integers(0, 61, length).tolist()), sampling=(GREEDY, DRAWN)[length % 2], max_tokens=9, n=n)
    for length, n in ((1, 1), (33, 2), (5, 1), (60, 1), (16, 1), (2, 1), (40, 1))
]


def answers(engine: Engine):
    """Tokens of every answer, and all log probabilities."""
    tokens, logprobs = {}, {}
    for event in engine.generate(REQUESTS):
        assert event.finish != "error", event.message
        key = event.request, event.sample
        tokens.setdefault(key, []).extend(event.tokens)
        logprobs.setdefault(key, []).extend(x.logprob for x in (*event.logprobs, *(event.prompt_logprobs or ())) if x)
    return tokens, logprobs


@pytest.mark.parametrize("shape", [pytest.param("every axis divides", marks=pytest.mark.slow), "no axis divides"])
def test_as_one_device(shape):
    cfg = SHAPES[shape]
    alone, alone_logprobs = answers(Engine(parameters(cfg), cfg, LIMITS))
    mesh = serving_mesh(jax.devices())
    spread = serving_params(abstract(cfg, "bf16", mesh), cfg, "bf16", held(parameters(cfg)))
    engine = Engine(spread, cfg, dataclasses.replace(LIMITS, shards=8), mesh=mesh)
    found, logprobs = answers(engine)
    assert found == alone
    for key, expected in alone_logprobs.items():
        np.testing.assert_allclose(logprobs[key], expected, atol=2e-5, rtol=1e-4)
    assert engine.load()[:3] == (0, 0, 0)
