"""The parts of a step that the engine's tests do not compare with float64."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.inference import step
from kimi_jax.inference.ops import ON_ONE_DEVICE


@pytest.mark.parametrize("rows_at_a_time, n", [(1, 4), (8, 4), (256, 0)])
def test_scores_of_given_tokens(monkeypatch, rows_at_a_time, n):
    """By pieces that do and do not divide the tokens."""
    monkeypatch.setattr(step, "ROWS", rows_at_a_time)
    rng = np.random.default_rng(6)
    x, head, after = rng.standard_normal((3, 7, 24)), rng.standard_normal((24, 61)), rng.integers(0, 61, (3, 7))
    z = x @ head
    expected = z - np.log(np.exp(z).sum(-1, keepdims=True))
    order = np.argsort(-expected, axis=-1)[..., :n]
    given = {"lm_head": jnp.asarray(head, jnp.float32)}, jnp.asarray(x, jnp.float32), jnp.asarray(after)
    own, tokens, top = jax.jit(partial(step._scores, n=n, ops=ON_ONE_DEVICE))(*given)
    np.testing.assert_allclose(own, np.take_along_axis(expected, after[..., None], -1)[..., 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(tokens, order)
    np.testing.assert_allclose(top, np.take_along_axis(expected, order, -1), rtol=1e-4, atol=1e-5)
