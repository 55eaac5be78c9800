"""YaRN frequencies and the rotation of interleaved pairs, against float64."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.config import RopeConfig
from kimi_jax.layers.rope import angles, frequencies, rotate


def test_frequencies_of_kimi_k2():
    f = frequencies(presets.kimi_k2_1t().rope, 64)
    plain = 50_000.0 ** (-2 * np.arange(32) / 64)
    assert f.dtype == np.float32 and f.shape == (32,)
    np.testing.assert_allclose(f[19:21], [1.62176e-3, 3.61405e-5], rtol=2e-6)
    np.testing.assert_allclose(f[:20], plain[:20], rtol=1e-6)
    np.testing.assert_allclose(f[20:], plain[20:] / 32, rtol=1e-6)


@pytest.mark.parametrize(
    ("theta", "factor", "original", "fast", "slow", "dim"),
    [
        (50_000.0, 32.0, 4096, 32.0, 1.0, 64),
        (10_000.0, 8.0, 512, 32.0, 1.0, 48),
        (10_000.0, 40.0, 4096, 16.0, 2.0, 22),
        (50_000.0, 4.0, 4, 1.0, 1.0, 16),  # every pair turns less than once: low is clipped to 0
        (500.0, 4.0, 100_000, 8.0, 1.0, 8),  # every pair turns more than beta_fast: high is clipped to dim - 1
    ],
)
def test_frequencies_of_yarn(theta, factor, original, fast, slow, dim):
    rope = RopeConfig(
        theta=theta, factor=factor, original_max_position_embeddings=original, beta_fast=fast, beta_slow=slow
    )

    def pair_that_turns(r):  # theta^(-2i/dim) * original = 2 pi r
        return dim / 2 * math.log(original / (2 * math.pi * r), theta)

    low, high = max(math.floor(pair_that_turns(fast)), 0), min(math.ceil(pair_that_turns(slow)), dim - 1)
    expected = []
    for i in range(dim // 2):
        ramp = float(i > low) if low == high else min(max((i - low) / (high - low), 0.0), 1.0)
        expected.append(theta ** (-2 * i / dim) * ((1 - ramp) + ramp / factor))
    np.testing.assert_allclose(frequencies(rope, dim), expected, rtol=2e-6)


def test_plain_rope_has_no_yarn():
    rope = RopeConfig(theta=10_000.0)
    np.testing.assert_allclose(frequencies(rope, 16), 10_000.0 ** (-np.arange(8) / 8), rtol=1e-6)
    assert rope.attention_scaling == 1 and rope.softmax_scaling == 1


def test_scales():
    m = 0.1 * math.log(32) + 1
    k2 = presets.kimi_k2_1t()
    assert k2.rope.attention_scaling == 1.0
    assert math.isclose(k2.softmax_scale, 192**-0.5 * m**2) and math.isclose(k2.softmax_scale, 0.1308608, rel_tol=1e-6)
    both = RopeConfig(factor=32.0, mscale=0.7, mscale_all_dim=1.3)
    assert math.isclose(both.attention_scaling, (0.07 * math.log(32) + 1) / (0.13 * math.log(32) + 1))
    assert math.isclose(RopeConfig(factor=32.0).attention_scaling, m)
    assert RopeConfig(factor=32.0).softmax_scaling == 1


def rotated(x: np.ndarray, positions: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Every pair (x_2i, x_2i+1) as a complex number, turned in place in float64; x is [B, T, N, R]."""
    f = frequencies(rope, x.shape[-1]).astype(np.float64)
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * positions[:, :, None, None] * f)
    return rope.attention_scaling * np.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize(
    "rope", [presets.YARN_K2, RopeConfig(factor=8.0, mscale=0.7, mscale_all_dim=1.3), RopeConfig()]
)
def test_rotation(rope):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 7, 3, 10)).astype(np.float32)
    positions = rng.integers(0, 500, (2, 7))
    cos, sin = angles(jnp.asarray(positions), rope, 10)
    expected = rotated(x.astype(np.float64), positions, rope)
    apart = np.concatenate([expected[..., 0::2], expected[..., 1::2]], axis=-1)  # first parts, then second parts
    np.testing.assert_allclose(rotate(jnp.asarray(x), cos, sin), apart, atol=1e-4)
    np.testing.assert_allclose(rotate(jnp.asarray(x[:, :, 0]), cos, sin), apart[:, :, 0], atol=1e-4)


def test_products_depend_on_the_distance_alone():
    rng = np.random.default_rng(1)
    q, k = (jnp.asarray(np.tile(rng.standard_normal(8), (1, 50, 1)), jnp.float32) for _ in range(2))
    cos, sin = angles(jnp.arange(50)[None], presets.YARN_K2, 8)
    products = np.asarray(jnp.einsum("BTR,BSR->TS", rotate(q, cos, sin), rotate(k, cos, sin), precision="highest"))
    for distance in range(-49, 50):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
    assert np.std(products[0]) > 0.1


def test_bfloat16_is_rotated_in_float32():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((1, 4, 2, 6)), jnp.bfloat16)
    cos, sin = angles(jnp.asarray([[0, 1, 1000, 90_000]]), presets.YARN_K2, 6)
    y = rotate(x, cos, sin)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, rotate(x.astype(jnp.float32), cos, sin).astype(jnp.bfloat16))
