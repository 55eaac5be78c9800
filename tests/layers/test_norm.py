"""RMS normalisation against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers.norm import rms_norm


def reference(x: np.ndarray, gain: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(np.float64)
    return gain * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("eps", [1e-6, 1e-1])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_float32(eps, scale):
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((3, 5, 37))).astype(np.float32)
    gain = rng.uniform(-1, 2, 37).astype(np.float32)
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(gain), eps), reference(x, gain, eps), rtol=3e-6)


def test_bfloat16_is_rounded_before_the_gain():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((40, 50)), jnp.bfloat16)
    gain = jnp.asarray(rng.uniform(0.5, 1.5, 50), jnp.float32)
    y = rms_norm(x, gain, 1e-6)
    assert y.dtype == jnp.bfloat16
    normed = reference(np.asarray(x), np.float64(1), 1e-6).astype(jnp.bfloat16)
    expected = (normed.astype(np.float32) * np.asarray(gain)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(y), expected)


def test_the_gradient_of_the_gain_is_summed_in_f32():
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((4096, 8)).astype(jnp.bfloat16) for _ in range(2))
    _, vjp = jax.vjp(lambda gain: rms_norm(jnp.asarray(x), gain, 1e-6), jnp.ones(8))
    normed = reference(x, np.float64(1), 1e-6).astype(jnp.bfloat16)
    expected = np.sum(normed.astype(np.float64) * dy.astype(np.float64), axis=0)
    np.testing.assert_allclose(vjp(jnp.asarray(dy))[0], expected, rtol=1e-5, atol=1e-4)


def test_zeros_stay_zeros_with_finite_gradients():
    grad = jax.grad(lambda x: rms_norm(x, jnp.ones(8), 1e-6).sum())(jnp.zeros((2, 8)))
    np.testing.assert_array_equal(rms_norm(jnp.zeros((2, 8)), jnp.ones(8), 1e-6), 0)
    np.testing.assert_allclose(grad, 1e3, rtol=1e-5)
