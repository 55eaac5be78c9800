"""Rotary position embedding with YaRN frequencies (arXiv 2309.00071), on interleaved pairs."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from kimi_jax.config import RopeConfig
from kimi_jax.dims import Array


def frequencies(rope: RopeConfig, dim: int) -> np.ndarray:
    """Angular frequency of each of the ``dim / 2`` pairs, in radians per position, f32.

    e_i = theta^(-2i/dim). YaRN divides the slow ones by ``factor``: f_i = e_i (1 - g_i) + e_i / factor * g_i, where
    the ramp g_i = clip((i - low) / (high - low), 0, 1) lies between the pairs that turn ``beta_fast`` and
    ``beta_slow`` times over the original context. It does not depend on the sequence length.
    """
    i = np.arange(dim // 2, dtype=np.float32)
    period = (np.float64(rope.theta) ** (2 * i / np.float32(dim))).astype(np.float32)  # rounded as the reference does:
    fast, slow = 1 / period, 1 / (np.float32(rope.factor) * period)  # at position 100,000 the last bit is visible
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
