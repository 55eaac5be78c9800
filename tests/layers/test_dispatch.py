"""Sorting assignments by expert and coming back."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kimi_jax.layers.dispatch import combine, sort_assignments, sum_copies

M, K, E, D = 11, 3, 6, 4
RNG = np.random.default_rng(0)
EXPERTS = np.stack([RNG.permutation(E - 1)[:K] for _ in range(M)])  # nobody chooses the last one


def test_order():
    order = sort_assignments(jnp.asarray(EXPERTS), E)
    order_A, inverse_MK = np.asarray(order.order_A), np.asarray(order.inverse_MK)
    assert sorted(order_A) == list(range(M * K))
    assert (np.diff(EXPERTS.reshape(-1)[order_A]) >= 0).all()
    np.testing.assert_array_equal(order_A[inverse_MK], np.arange(M * K).reshape(M, K))
    np.testing.assert_array_equal(order.sizes_E, [(EXPERTS == e).sum() for e in range(E)])


def test_sum_copies():
    order = sort_assignments(jnp.asarray(EXPERTS), E)
    x = RNG.standard_normal((M, D)).astype(np.float32)
    x_AD = jnp.asarray(np.repeat(x, K, axis=0)[np.asarray(order.order_A)])
    np.testing.assert_allclose(sum_copies(x_AD, order), K * x, rtol=1e-6)


def test_combine():
    y, weights = RNG.standard_normal((M, K, D)), RNG.uniform(size=(M, K))
    ours = combine(jnp.asarray(y, jnp.float32), jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(ours, (y * weights[..., None]).sum(axis=1), atol=1e-6)
    assert combine(jnp.ones((M, K, D), jnp.bfloat16), jnp.ones((M, K))).dtype == jnp.float32


def test_copies_are_summed_in_float32():
    order = sort_assignments(jnp.asarray([[0, 1, 2]]), E)
    x_AD = jnp.asarray([[256.0], [1.0], [1.0]], jnp.bfloat16)  # in bf16, 256 + 1 = 256
    assert float(sum_copies(x_AD, order)[0, 0]) == 258
