"""From tokens to assignments sorted by expert, and back, by gathers alone."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp

from kimi_jax.dims import Array


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
    expert_A = experts_MK.reshape(-1)
    order_A = jnp.argsort(expert_A)
    places_A = jnp.arange(order_A.size, dtype=order_A.dtype)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(places_A, unique_indices=True)
    sizes_E = jnp.zeros(n_experts, jnp.int32).at[expert_A].add(1)
    return Order(order_A, inverse_A.reshape(experts_MK.shape), sizes_E)


def sum_copies(x_AD: Array, order: Order) -> Array:
    """Per token, the sum over its K assignments in f32, [M, D]."""
    return jnp.sum(x_AD[order.inverse_MK].astype(jnp.float32), axis=1)


def combine(y_MKD: Array, weights_MK: Array) -> Array:
    """y [M, D] = sum_k w_k y_k in f32."""
    return jnp.einsum("MKD,MK->MD", y_MKD.astype(jnp.float32), weights_MK)
