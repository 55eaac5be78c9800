"""Looking up rows of a split table against plain indexing, with the gradient of the table."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kimi_jax.sharding.lookup import parallel_lookup
from kimi_jax.sharding.mesh import AXES

B, T, D, V = 8, 6, 16, 12


@pytest.mark.parametrize("shape", [(8, 1, 1, 1, 1), (1, 2, 4, 1, 1), (1, 1, 2, 2, 2), (2, 2, 1, 2, 1)], ids=str)
def test_rows_and_the_gradient_of_the_table(shape):
    rng = np.random.default_rng(0)
    table, dy = rng.standard_normal((V, D)).astype(np.float32), rng.standard_normal((B, T, D)).astype(np.float32)
    tokens = rng.integers(0, V - 1, (B, T))  # many times each, the last one never
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)
    lookup = parallel_lookup(mesh)

    @jax.jit
    def run(table, tokens, dy):
        rows, pullback = jax.vjp(lambda table: lookup(table, tokens, jnp.float32), table)
        return rows, *pullback(dy)

    rows, dtable = run(table, jnp.asarray(tokens), dy)
    np.testing.assert_array_equal(rows, table[tokens])
    expected = np.zeros((V, D))
    np.add.at(expected, tokens, dy.astype(np.float64))
    np.testing.assert_allclose(dtable, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gradient_is_added_up_in_float32(dtype):
    """256 + 1 is 256 in bf16, from either end; whatever the table's dtype."""
    mesh = Mesh(np.asarray(jax.devices()).reshape(1, 2, 4, 1, 1), AXES, axis_types=(AxisType.Auto,) * 5)
    lookup, tokens = parallel_lookup(mesh), jnp.zeros((8, 1), jnp.int32)
    dy = jnp.ones((8, 1, D), jnp.bfloat16).at[jnp.array([0, -1])].set(256)
    _, pullback = jax.vjp(lambda table: lookup(table, tokens, jnp.bfloat16), jnp.ones((V, D), dtype))
    np.testing.assert_array_equal(jax.jit(pullback)(dy)[0][0], jnp.asarray(518, dtype))
