"""From tokens to assignments sorted by expert, and back, with gathers in both directions of differentiation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kimi_jax.dims import Array


class Order(NamedTuple):
    """The assignments (token m, choice k) -> expert, flattened as a = m * K + k and sorted by expert."""

    order_A: Array  # which assignment stands at each sorted place
    inverse_MK: Array  # the sorted place of each assignment
    sizes_E: Array  # assignments per expert


def sort_assignments(experts_MK: Array, n_experts: int) -> Order:
    expert_A = experts_MK.reshape(-1)
    order_A = jnp.argsort(expert_A)
    places_A = jnp.arange(order_A.size, dtype=order_A.dtype)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(places_A, unique_indices=True)
    sizes_E = jnp.zeros(n_experts, jnp.int32).at[expert_A].add(1)
    return Order(order_A, inverse_A.reshape(experts_MK.shape), sizes_E)


@jax.custom_vjp
def gather_tokens(x_MD: Array, order: Order) -> Array:
    """The token of every sorted assignment, [A, D]; the gradient sums a token's K copies in f32."""
    return x_MD[order.order_A // order.inverse_MK.shape[1]]


def _gather_fwd(x_MD: Array, order: Order):
    return gather_tokens(x_MD, order), order


def _gather_bwd(order: Order, dx_AD: Array):
    return sum_copies(dx_AD, order).astype(dx_AD.dtype), None


gather_tokens.defvjp(_gather_fwd, _gather_bwd)


def sum_copies(x_AD: Array, order: Order) -> Array:
    """Per token, the sum over its K assignments in f32, [M, D]."""
    return jnp.sum(x_AD[order.inverse_MK].astype(jnp.float32), axis=1)


@jax.custom_vjp
def unsort(y_AD: Array, order: Order) -> Array:
    """The result of every assignment, [M, K, D]."""
    return y_AD[order.inverse_MK]


def _unsort_fwd(y_AD: Array, order: Order):
    return y_AD[order.inverse_MK], order


def _unsort_bwd(order: Order, dy_MKD: Array):
    return dy_MKD.reshape(-1, dy_MKD.shape[-1])[order.order_A], None


unsort.defvjp(_unsort_fwd, _unsort_bwd)


def combine(y_MKD: Array, weights_MK: Array) -> Array:
    """y [M, D] = sum_k w_k y_k in f32."""
    return jnp.einsum("MKD,MK->MD", y_MKD.astype(jnp.float32), weights_MK)
