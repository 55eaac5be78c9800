"""Weights with scales against float64, one weight at a time."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from kimi_jax.layers.linear import contract
from kimi_jax.layers.quantized import Quantized, reblocked

CASES = {  # shape, blocks
    "matrix": ((256, 384), (128, 128)),
    "partial blocks": ((136, 200), (128, 128)),
    "shorter than a block": ((36, 20), (128, 128)),
    "24-wide heads in blocks of 64": ((130, 3, 24), (64, 1, 8)),
    "heads first": ((3, 24, 70), (1, 8, 64)),
    "a scale for every output": ((36, 5, 7), (36, 1, 1)),
    "two inputs": ((5, 7, 36), (5, 7, 1)),
    "stacked": ((2, 3, 24, 40), (16, 16)),
    "ones": ((5, 7), (1, 1)),
}


def drawn(shape, blocks, dtype=jnp.float8_e4m3fn) -> Quantized:
    rng = np.random.default_rng(0)
    every = (1,) * (len(shape) - len(blocks)) + blocks
    scale = rng.uniform(0.5, 2, [-(-size // block) for size, block in zip(shape, every, strict=True)])
    values = rng.integers(-127, 128, shape) if dtype == jnp.int8 else rng.standard_normal(shape)
    return Quantized(jnp.asarray(values, dtype), jnp.asarray(scale, jnp.float32), blocks)


def float64(w: Quantized) -> np.ndarray:
    values, scale = np.asarray(w.values.astype(jnp.float32), np.float64), np.asarray(w.scale, np.float64)
    every = (1,) * (values.ndim - len(w.blocks)) + w.blocks
    found = np.empty(values.shape)
    for at in np.ndindex(values.shape):
        found[at] = values[at] * scale[tuple(i // block for i, block in zip(at, every, strict=True))]
    return found


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_its_value_times_the_scale_of_its_block(name, dtype):
    w = drawn(*CASES[name], dtype)
    expected = float64(w)
    assert (w.shape, w.ndim) == (expected.shape, expected.ndim)
    np.testing.assert_allclose(w.astype(jnp.float32), expected, rtol=1e-7)
    np.testing.assert_array_equal(w.astype(jnp.bfloat16), expected.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("matrix", (32, 64)),
        ("partial blocks", (8, 1)),
        ("24-wide heads in blocks of 64", (2, 1, 4)),
        ("stacked", (4, 8)),
    ],
)
def test_smaller_blocks_change_no_weight(name, blocks):
    w = drawn(*CASES[name])
    smaller = reblocked(w, blocks)
    n = len(blocks)
    assert smaller.blocks[-n:] == blocks
    assert smaller.scale.shape[-n:] == tuple(-(-s // b) for s, b in zip(w.shape[-n:], blocks, strict=True))
    np.testing.assert_array_equal(float64(smaller), float64(w))


def test_an_axis_with_one_scale_keeps_it():
    w = drawn((36, 20), (128, 4))
    smaller = reblocked(w, (3, 2))
    assert (smaller.scale.shape, smaller.blocks) == ((1, 10), (128, 2))
    np.testing.assert_array_equal(float64(smaller), float64(w))


def test_a_scan_over_layers_and_an_index_of_an_expert():
    w = drawn((2, 3, 24, 40), (16, 16))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 24)), jnp.float32)

    @jax.jit
    def run(w: Quantized):
        def layer(_, w: Quantized):
            expert = jax.tree.map(partial(lax.dynamic_index_in_dim, index=1, keepdims=False), w)
            return _, contract("MD,DF->MF", x, expert)

        return lax.scan(layer, 0, w)[1]

    np.testing.assert_allclose(run(w), np.asarray(x, np.float64) @ float64(w)[:, 1], rtol=1e-5, atol=1e-5)


def test_a_product_in_bf16():
    w = drawn((36, 3, 24), (36, 1, 8))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 36)), jnp.bfloat16)
    found = jax.jit(partial(contract, "BTD,DNX->BTNX"))(x, w)
    rounded = np.asarray(float64(w).astype(jnp.bfloat16), np.float64)
    expected = np.einsum("BTD,DNX->BTNX", np.asarray(x, np.float64), rounded)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=1e-2, atol=1e-3 * np.abs(expected).max())
