"""Sorting assignments by expert and coming back."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers.dispatch import FEW, combine, sort_assignments, sum_copies

M, K, E, D = 11, 3, 6, 4
RNG = np.random.default_rng(0)
EXPERTS = np.stack([RNG.permutation(E - 1)[:K] for _ in range(M)])  # nobody chooses the last one


@pytest.mark.parametrize("n_experts", [E, FEW + 1], ids=["counted", "sorted"])
@pytest.mark.parametrize("n_none", [0, 7])
def test_order(n_experts, n_none):
    experts = RNG.integers(n_experts - 1, size=(M, K))  # nobody chooses the last one
    experts.reshape(-1)[RNG.permutation(M * K)[:n_none]] = n_experts
    order = sort_assignments(jnp.asarray(experts), n_experts)
    expected_A = np.argsort(experts.reshape(-1), kind="stable")
    np.testing.assert_array_equal(order.order_A, expected_A)
    np.testing.assert_array_equal(expected_A[np.asarray(order.inverse_MK)], np.arange(M * K).reshape(M, K))
    np.testing.assert_array_equal(order.sizes_E, [(experts == e).sum() for e in range(n_experts)])


def test_more_assignments_than_can_be_sorted():
    with pytest.raises(ValueError, match="fewer tokens"):
        jax.eval_shape(lambda e: sort_assignments(e, 1000), jax.ShapeDtypeStruct((2**20, 8), jnp.int32))


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
