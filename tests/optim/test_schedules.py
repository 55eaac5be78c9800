"""The published schedule at the published numbers (Kimi K2 report, section 2.5)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.optim import warmup_stable_cosine

TOKENS = 2**26  # per step
K2 = dict(warmup_steps=500, stable_tokens=10e12, decay_tokens=5.5e12, final=2e-5, tokens_per_step=TOKENS)


def exact(tokens: float) -> float:
    """After the warm-up, in float64."""
    past = min(max((tokens - 10e12) / 5.5e12, 0.0), 1.0)
    return 2e-5 + 0.5 * (2e-4 - 2e-5) * (1 + np.cos(np.pi * past))


@pytest.mark.parametrize(
    "step, expected",
    [(0, 0.0), (1, 4e-7), (250, 1e-4), (500, 2e-4), (501, 2e-4)]
    + [(tokens / TOKENS, lr) for tokens, lr in [(10e12, 2e-4), (12.75e12, 1.1e-4), (15.5e12, 2e-5), (20e12, 2e-5)]],
)
def test_kimi_k2(step, expected):
    np.testing.assert_allclose(warmup_stable_cosine(2e-4, **K2)(step), expected, rtol=1e-6, atol=1e-12)


def test_whole_curve_compiled():
    steps = np.arange(500, 240_000, 997)
    rates = jax.jit(jax.vmap(warmup_stable_cosine(2e-4, **K2)))(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(rates, [exact(float(step) * TOKENS) for step in steps], rtol=3e-6)
    assert np.all(np.diff(rates) <= 0)


def test_annealing_is_linear_and_ends():
    rate = warmup_stable_cosine(2e-4, **K2, anneal_tokens=460e9, anneal_final=7e-6)
    for tokens, expected in [(12.75e12, 1.1e-4), (15.5e12, 2e-5), (15.73e12, 1.35e-5), (15.96e12, 7e-6), (20e12, 7e-6)]:
        np.testing.assert_allclose(rate(tokens / TOKENS), expected, rtol=1e-5)


def test_tokens_per_step_only_stretch_it():
    few, many = (warmup_stable_cosine(2e-4, **{**K2, "tokens_per_step": n}) for n in (TOKENS, 2 * TOKENS))
    np.testing.assert_allclose(few(200_000), many(100_000), rtol=1e-6)


def test_without_warm_up():
    rate = warmup_stable_cosine(1.0, warmup_steps=0, stable_tokens=80, decay_tokens=80, final=0.5, tokens_per_step=8)
    np.testing.assert_allclose([rate(step) for step in (0, 10, 15, 20, 99)], [1, 1, 0.75, 0.5, 0.5], rtol=1e-6)


def test_without_decay():
    """The rate stays at its peak, whatever ``final`` says, until the annealing."""
    same = dict(warmup_steps=4, stable_tokens=80, decay_tokens=0, final=0.5, tokens_per_step=8)
    rate = warmup_stable_cosine(1.0, **same)
    np.testing.assert_allclose([rate(step) for step in (2, 4, 10, 11, 10**9)], [0.5, 1, 1, 1, 1], rtol=1e-6)
    annealed = warmup_stable_cosine(1.0, **same, anneal_tokens=16, anneal_final=0.0)
    np.testing.assert_allclose([annealed(step) for step in (10, 11, 12, 99)], [1, 0.5, 0, 0], atol=1e-6)


def test_decay_inside_the_warm_up_multiplies():
    """Tokens count from the first step: a plateau of no length starts to decay while the warm-up still climbs."""
    rate = warmup_stable_cosine(1.0, warmup_steps=10, stable_tokens=0, decay_tokens=10, final=0.0, tokens_per_step=1)
    np.testing.assert_allclose(rate(5), 0.5 * 0.5, rtol=1e-6)
