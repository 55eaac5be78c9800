"""Rows in eight bits while they travel: e4m3, with one f32 scale for every tile of 128 numbers.

What DeepSeek-V3 (arXiv 2412.19437, section 3.3) sends to the experts, activations and their gradients; results travel
back as they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp

from kimi_jax.dims import Array

TILE = 128
LARGEST = 448.0  # of e4m3


class Fp8Rows(NamedTuple):
    value_AD: Array
    scale_At: Array


def compressed(x_AD: Array) -> Fp8Rows:
    """Tiles divided by a scale that takes their largest number to 448; a row that TILE does not divide is one tile."""
    A, D = x_AD.shape
    tiles_Atz = x_AD.astype(jnp.float32).reshape(A, -1, TILE if D % TILE == 0 else D)
    largest_At = jnp.max(jnp.abs(tiles_Atz), axis=2)
    scale_At = jnp.where(largest_At > 0, largest_At / LARGEST, 1.0)
    return Fp8Rows((tiles_Atz / scale_At[..., None]).astype(jnp.float8_e4m3fn).reshape(A, D), scale_At)


def restored(rows: Fp8Rows, dtype: Any) -> Array:
    A, n_tiles = rows.scale_At.shape
    tiles_Atz = rows.value_AD.astype(jnp.float32).reshape(A, n_tiles, -1) * rows.scale_At[..., None]
    return tiles_Atz.reshape(rows.value_AD.shape).astype(dtype)
