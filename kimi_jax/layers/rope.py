"""Rotary position embedding with YaRN frequencies (arXiv 2309.00071), on interleaved pairs."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from kimi_jax.config import RopeConfig
from kimi_jax.dims import Array

SLEEF_EXP = np.array([0.001363246468, 0.008365969174, 0.04167108238, 0.1666655242, 0.4999998510], np.float32)  # s^4..


def frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Angular frequency of each of the ``dim / 2`` pairs, in radians per position, f32.

    e_i = theta^(-2i/dim). YaRN divides the slow ones by ``factor``: f_i = e_i (1 - g_i) + e_i / factor * g_i, where
    the ramp g_i = clip((i - low) / (high - low), 0, 1) lies between the pairs that turn ``beta_fast`` and
    ``beta_slow`` times over the original context. It does not depend on the sequence length.
    """
    i = np.arange(dim // 2, dtype=np.float32)
    period = _powers(np.float32(rope.theta), 2 * i / np.float32(dim))
    fast, slow = 1 / period, 1 / (np.float32(rope.factor) * period)
    if rope.factor == 1:
        return fast

    def pair_turning(turns: float) -> float:
        span = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(rope.theta))

    low = max(math.floor(pair_turning(rope.beta_fast)), 0)
    high = min(math.ceil(pair_turning(rope.beta_slow)), dim - 1)
    if low == high:
        high += 0.001
    keep = 1 - np.clip((i - np.float32(low)) / np.float32(high - low), 0, 1)
    return (slow * (1 - keep) + fast * keep).astype(np.float32)


def _powers(base: np.float32, x: np.ndarray) -> np.ndarray:
    """base^x for x in 0..1, in f32 and with the bits that the reference gets from PyTorch on a CPU.

    Which of its two neighbours in f32 stands for a power matters: at position 5,000 the other turns 1e-4 further.
    PyTorch takes 16 numbers at a time, as long as there are so many: base^x = 2^q e^s with |s| <= log(2) / 2, and
    e^s = 1 + s + s^2 u(s), u in f32 (SLEEF's powf, arXiv 2001.09258). The others it asks of the C library.
    """
    exponent = x.astype(np.float64) * np.log(np.float64(base))
    q = np.rint(exponent / np.log(2))
    s = exponent - q * np.log(2)
    u = np.zeros_like(s)
    for coefficient in SLEEF_EXP:
        u = (u * s.astype(np.float32) + coefficient).astype(np.float32).astype(np.float64)  # one fused step
    vectors = ((1 + s + s * s * u) * 2**q).astype(np.float32)
    n = len(x) // 16 * 16
    return np.array([*vectors[:n], *(base**y for y in x[n:])])


def angles(positions_BT: Array, rope: RopeConfig, dim: int) -> tuple[Array, Array]:
    """cos and sin of position * frequency, each [B, T, dim / 2] in f32, times YaRN's attention scaling."""
    phase = positions_BT[..., None].astype(jnp.float32) * frequencies(rope, dim)
    return jnp.cos(phase) * rope.attention_scaling, jnp.sin(phase) * rope.attention_scaling


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotates the pairs (x_2i, x_2i+1); the output holds all first parts, then all second parts.

    ``x`` is [B, T, R] or [B, T, N, R]; queries and keys come out in the same order, so their products are those of
    a rotation in place. Only a stored rotary key sees the order.
    """
    if x.ndim == 4:
        cos, sin = cos[:, :, None], sin[:, :, None]
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
