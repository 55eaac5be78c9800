"""Routed experts by grouped products: the assignments sorted by expert, and ``lax.ragged_dot``, one kernel on TPU.

Eight-bit weights go through a kernel of ours (``kernels.grouped_quantized``): ``ragged_dot`` takes none with scales.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array, Params
from kimi_jax.kernels.grouped_quantized import grouped as grouped_quantized
from kimi_jax.kernels.grouped_quantized import grouped_plain as grouped_quantized_plain
from kimi_jax.kernels.grouped_quantized import tiles
from kimi_jax.layers.dispatch import Hidden, Order, combine, sort_assignments, sum_copies
from kimi_jax.layers.mlp import swiglu
from kimi_jax.layers.quantized import Quantized

ROWS_SUMMED = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped(x_AX: Array, w_EXY: Array, sizes_E: Array) -> Array:
    """Every row times the matrix of its expert, in the dtype of ``x``; zeros past the last expert's rows."""
    y_AY = lax.ragged_dot(
        x_AX, w_EXY.astype(x_AX.dtype), sizes_E, precision=_precision(x_AX), preferred_element_type=jnp.float32
    )
    return y_AY.astype(x_AX.dtype)


def grouped_gradient(x_AX: Array, dy_AY: Array, sizes_E: Array) -> Array:
    """The gradient of the matrices in ``grouped``, [E, X, Y] in f32."""
    return lax.ragged_dot_general(
        x_AX, dy_AY, sizes_E, ROWS_SUMMED, precision=_precision(x_AX), preferred_element_type=jnp.float32
    )


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def forward(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> tuple[Array, Hidden]:
    """As ``blocked_experts.forward``, but for the rows past the last in what is kept."""
    order = sort_assignments(experts_MK, p["gate"].shape[0])
    return _run(p, x_MD, weights_MK, order, order.sizes_E)


def ragged_experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """``forward`` with the weights of one layer of a stack [L, E, ...], read in place: the experts of all layers are
    groups, and on TPU the kernel visits those that have rows. Not differentiable."""
    if isinstance(stack["gate"], Quantized):
        return _quantised_experts_of(stack, layer, x_MD, weights_MK, experts_MK)
    L, E = stack["gate"].shape[:2]
    flat = jax.tree.map(lambda w: w.reshape(L * E, *w.shape[2:]), stack)
    order = sort_assignments(experts_MK, E)
    sizes_LE = lax.dynamic_update_slice(jnp.zeros(L * E, jnp.int32), order.sizes_E, (layer * E,))
    return _run(flat, x_MD, weights_MK, order, sizes_LE)[0]


def _run(p: Params, x_MD: Array, weights_MK: Array, order: Order, sizes_E: Array) -> tuple[Array, Hidden]:
    x_AD = x_MD[order.order_A // weights_MK.shape[1]]
    gate_AF, up_AF = (grouped(x_AD, p[name], sizes_E) for name in ("gate", "up"))
    y_AD = grouped(swiglu(gate_AF, up_AF), p["down"], sizes_E)
    return combine(y_AD[order.inverse_MK], weights_MK).astype(x_MD.dtype), Hidden(order, gate_AF, up_AF)


def _quantised_experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    (M, K), (L, E, _, _) = experts_MK.shape, stack["gate"].shape
    flat = jax.tree.map(lambda w: w.reshape(L * E, *w.shape[2:]), stack)
    order = sort_assignments(experts_MK, E)
    t = tiles(order.sizes_E, M * K)
    token_R = jnp.zeros(t.n_slots, jnp.int32).at[t.slot_A].set(order.order_A // K, mode="drop")

    def product(x_RX: Array, w: Quantized) -> Array:
        rows, columns = w.blocks[-2:]
        on_tpu = partial(grouped_quantized, blocks=(rows, columns), most=min(E, M * K))
        elsewhere = partial(grouped_quantized_plain, blocks=(rows, columns))
        args = x_RX, w.values, w.scale, layer * E + t.group_I, t.count
        return lax.platform_dependent(*args, tpu=on_tpu, default=elsewhere)

    x_RD = x_MD[token_R]
    y_RD = product(swiglu(product(x_RD, flat["gate"]), product(x_RD, flat["up"])), flat["down"])
    y_AD = y_RD.at[t.slot_A].get(mode="fill", fill_value=0)
    return combine(y_AD[order.inverse_MK], weights_MK).astype(x_MD.dtype)


def backward(p: Params, x_MD: Array, weights_MK: Array, hidden: Hidden, dy_MD: Array) -> tuple[Params, Array, Array]:
    """As ``blocked_experts.backward``."""
    (order, gate_AF, up_AF), dtype, sizes_E = hidden, x_MD.dtype, hidden.order.sizes_E
    token_A = order.order_A // weights_MK.shape[1]
    x_AD, dy_AD = x_MD[token_A], dy_MD[token_A]
    weight_A1 = weights_MK.reshape(-1)[order.order_A][:, None]
    h_AF, swiglu_vjp = jax.vjp(swiglu, gate_AF, up_AF)
    h_f32, transposed = h_AF.astype(jnp.float32), {name: w.swapaxes(1, 2) for name, w in p.items()}
    dh_f32 = grouped(dy_AD, transposed["down"], sizes_E).astype(jnp.float32)
    dgate_AF, dup_AF = swiglu_vjp((dh_f32 * weight_A1).astype(dtype))
    dx_AD = grouped(dgate_AF, transposed["gate"], sizes_E).astype(jnp.float32)
    dx_AD = (dx_AD + grouped(dup_AF, transposed["up"], sizes_E).astype(jnp.float32)).astype(dtype)
    dp = {
        "gate": grouped_gradient(x_AD, dgate_AF, sizes_E),
        "up": grouped_gradient(x_AD, dup_AF, sizes_E),
        "down": grouped_gradient((h_f32 * weight_A1).astype(dtype), dy_AD, sizes_E),
    }
    dweight_A = jnp.sum(dh_f32 * h_f32, axis=-1)
    return dp, sum_copies(dx_AD, order).astype(dtype), dweight_A[order.inverse_MK]
