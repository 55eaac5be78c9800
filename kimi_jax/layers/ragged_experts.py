"""Routed experts by grouped products: the assignments sorted by expert, and ``lax.ragged_dot``, one kernel on TPU."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array, Params
from kimi_jax.layers.blocked_experts import ladder
from kimi_jax.layers.dispatch import Hidden, Order, combine, sort_assignments, sum_copies
from kimi_jax.layers.mlp import swiglu


def grouped(x_AX: Array, w_EXY: Array, sizes_E: Array) -> Array:
    """Every row times the matrix of its expert, in the dtype of ``x``; zeros past the last expert's rows."""
    precision = lax.Precision.HIGHEST if x_AX.dtype == jnp.float32 else None
    y_AY = lax.ragged_dot(
        x_AX, w_EXY.astype(x_AX.dtype), sizes_E, precision=precision, preferred_element_type=jnp.float32
    )
    return y_AY.astype(x_AX.dtype)


def _tokens(order: Order, n_experts: int) -> Array:
    """The token of every sorted row, with as many rows past the end as ``blocked_experts`` keeps."""
    (M, K) = order.inverse_MK.shape
    return jnp.pad(order.order_A // K, (0, ladder(M * K, n_experts)[-1]))


def forward(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> tuple[Array, Hidden]:
    """As ``blocked_experts.forward``."""
    E = p["gate"].shape[0]
    order = sort_assignments(experts_MK, E)
    x_AD = x_MD[_tokens(order, E)]
    gate_AF, up_AF = (grouped(x_AD, p[name], order.sizes_E) for name in ("gate", "up"))
    y_AD = grouped(swiglu(gate_AF, up_AF), p["down"], order.sizes_E)
    return combine(y_AD[order.inverse_MK], weights_MK).astype(x_MD.dtype), Hidden(order, gate_AF, up_AF)


def backward(p: Params, x_MD: Array, weights_MK: Array, hidden: Hidden, dy_MD: Array) -> tuple[Params, Array, Array]:
    """As ``blocked_experts.backward``."""
    (order, gate_AF, up_AF), dtype = hidden, x_MD.dtype
    product = partial(grouped, sizes_E=order.sizes_E)
    token_A = _tokens(order, p["gate"].shape[0])
    weight_A1 = jnp.pad(weights_MK.reshape(-1)[order.order_A], (0, token_A.size - order.order_A.size))[:, None]
    h_AF, swiglu_vjp = jax.vjp(swiglu, gate_AF, up_AF)
    h_f32 = h_AF.astype(jnp.float32)
    _, down_vjp = jax.vjp(product, (h_f32 * weight_A1).astype(dtype), p["down"])
    _, gate_vjp = jax.vjp(product, x_MD[token_A], p["gate"])
    _, up_vjp = jax.vjp(product, x_MD[token_A], p["up"])
    dh_AF, ddown = down_vjp(dy_MD[token_A])
    dgate_AF, dup_AF = swiglu_vjp((dh_AF.astype(jnp.float32) * weight_A1).astype(dtype))
    (dx_gate_AD, dgate), (dx_up_AD, dup) = gate_vjp(dgate_AF), up_vjp(dup_AF)
    dx_AD = (dx_gate_AD.astype(jnp.float32) + dx_up_AD.astype(jnp.float32)).astype(dtype)
    dweight_A = jnp.sum(dh_AF.astype(jnp.float32) * h_f32, axis=-1)
    dp = {name: dw.astype(jnp.float32) for name, dw in (("gate", dgate), ("up", dup), ("down", ddown))}
    return dp, sum_copies(dx_AD, order).astype(dtype), dweight_A[order.inverse_MK]
