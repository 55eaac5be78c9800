"""From tokens to assignments sorted by expert, and back, by gathers alone.

Counts are sums over comparisons, and few experts are put in order by counting: XLA:TPU makes a sort of a scatter that
adds up, and each sort takes it ten seconds and more to compile.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

FEW = 16  # experts whose assignments are counted, not sorted


class Order(NamedTuple):
    """The assignments (token m, choice k) -> expert, flattened as a = m * K + k and sorted by expert."""

    order_A: Array  # which assignment stands at each sorted place
    inverse_MK: Array  # the sorted place of each assignment
    sizes_E: Array  # assignments per expert


class Hidden(NamedTuple):
    """What the backward pass of sorted experts keeps, besides their arguments; the rows past the last are no rows."""

    order: Order
    gate_AF: Array
    up_AF: Array


def sort_assignments(experts_MK: Array, n_experts: int) -> Order:
    """Stable; expert ``n_experts`` stands for none, comes last and is not counted."""
    expert_A = experts_MK.reshape(-1)
    places_A = jnp.arange(expert_A.size, dtype=jnp.int32)
    is_EA = expert_A == jnp.arange(n_experts + 1)[:, None]
    sizes_E = jnp.sum(is_EA, axis=1, dtype=jnp.int32)
    if n_experts <= FEW:
        start_E = jnp.cumsum(sizes_E) - sizes_E
        place_EA = start_E[:, None] + jnp.cumsum(is_EA, axis=1, dtype=jnp.int32) - 1
        inverse_A = jnp.sum(jnp.where(is_EA, place_EA, 0), axis=0)
        order_A = _inverted(inverse_A, places_A)
    else:
        if (n_experts + 1) * expert_A.size > 2**31:
            raise ValueError(
                f"{expert_A.size:,} assignments to {n_experts} experts at once: give fewer tokens at a time"
            )
        order_A = lax.sort(expert_A * expert_A.size + places_A, is_stable=False) % expert_A.size  # no ties to break
        inverse_A = _inverted(order_A, places_A)
    return Order(order_A, inverse_A.reshape(experts_MK.shape), sizes_E[:n_experts])


def _inverted(permutation_A: Array, places_A: Array) -> Array:
    return jnp.zeros_like(places_A).at[permutation_A].set(places_A, unique_indices=True)


def sum_copies(x_AD: Array, order: Order) -> Array:
    """Per token, the sum over its K assignments in f32, [M, D]."""
    return jnp.sum(x_AD[order.inverse_MK].astype(jnp.float32), axis=1)


def combine(y_MKD: Array, weights_MK: Array) -> Array:
    """y [M, D] = sum_k w_k y_k in f32."""
    return jnp.einsum("MKD,MK->MD", y_MKD.astype(jnp.float32), weights_MK)
