"""Root-mean-square normalisation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array


@partial(jax.checkpoint, prevent_cse=False, static_argnums=2)  # keeps x alone for the backward pass
def rms_norm(x: Array, gain: Array, eps: float) -> Array:
    """y = gain * x / sqrt(mean(x^2) + eps) over the last axis.

    Computed in f32 and rounded to the dtype of ``x`` before the gain is applied, as the reference does; the gain itself
    stays f32, so that its gradient is summed in f32 over all tokens and devices.
    """
    x_f32 = x.astype(jnp.float32)
    y = x_f32 * lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (gain.astype(jnp.float32) * y.astype(x.dtype)).astype(x.dtype)
