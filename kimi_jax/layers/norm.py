"""Root-mean-square normalisation."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array


def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """y = gain * x / sqrt(mean(x^2) + eps) over the last axis.

    Computed in f32 and cast to the dtype of ``x`` before the gain is applied, as the reference does.
    """
    x_f32 = x.astype(jnp.float32)
    y = x_f32 * lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return gain.astype(x.dtype) * y.astype(x.dtype)
