"""The published schedule at the published numbers (Kimi K2 report, section 2.5)."""

import jax
import numpy as np
import pytest

from kimi_jax.optim import warmup_stable_cosine

TOKENS = 2**26
K2 = dict(warmup_steps=500, stable_tokens=10e12, decay_tokens=5.5e12, final=2e-5, tokens_per_step=TOKENS)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(250 * TOKENS, 1e-4), (500 * TOKENS, 2e-4), (10e12, 2e-4), (12.75e12, 1.1e-4), (15.5e12, 2e-5), (20e12, 2e-5)],
)
def test_kimi_k2(tokens, expected):
    rate = jax.jit(warmup_stable_cosine(2e-4, **K2))
    np.testing.assert_allclose(rate(round(tokens / TOKENS)), expected, rtol=1e-4)


def test_annealing():
    rate = warmup_stable_cosine(2e-4, **K2, anneal_tokens=460e9, anneal_final=7e-6)
    np.testing.assert_allclose(rate(round(15.5e12 / TOKENS)), 2e-5, rtol=1e-3)
    np.testing.assert_allclose(rate(round(15.73e12 / TOKENS)), 1.35e-5, rtol=1e-3)
    np.testing.assert_allclose(rate(round(17e12 / TOKENS)), 7e-6, rtol=1e-5)


def test_warm_up_alone():
    rate = warmup_stable_cosine(1.0, warmup_steps=0, stable_tokens=0, decay_tokens=0, final=0.1, tokens_per_step=8)
    assert rate(0) == 1.0 and rate(10**9) == 1.0
