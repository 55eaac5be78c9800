"""Routed experts without drops: every assignment of a token to an expert is computed, whatever the balance.

    y = sum_k w_k SwiGLU(x; expert e_k)

``sorted_experts`` orders the assignments by expert and runs one grouped product per weight; ``looped_experts`` is its
plain twin. Both sum over k in f32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, Array, Params, ParamSpec, Specs
from kimi_jax.errors import UserError
from kimi_jax.layers.grouped import grouped_matmul
from kimi_jax.layers.linear import contract
from kimi_jax.layers.mlp import swiglu
from kimi_jax.layers.router import Routing


def specs(cfg: ModelConfig) -> Specs:
    E, D, F, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.initializer_range
    return {
        "gate": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "up": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "down": ParamSpec((E, F, D), (EXPERTS, "expert_mlp", "embed"), std),
    }


@jax.custom_vjp
def permute(x: Array, order_A: Array, inverse_A: Array) -> Array:
    """x[order], whose gradient is again a gather, dy[inverse], instead of a scatter."""
    return x[order_A]


permute.defvjp(
    lambda x, order_A, inverse_A: (x[order_A], (order_A, inverse_A)),
    lambda residuals, dy: (dy[residuals[1]], None, None),
)


@jax.custom_vjp
def repeat_sorted(x_MD: Array, order_A: Array, inverse_MK: Array) -> Array:
    """Row order[a] // K of ``x`` for every assignment a; its gradient gathers and sums the K copies in f32."""
    return x_MD[order_A // inverse_MK.shape[1]]


def _repeat_bwd(residuals, dy_AD: Array):
    (inverse_MK,) = residuals
    dx_MD = sum(dy_AD[inverse_MK[:, k]].astype(jnp.float32) for k in range(inverse_MK.shape[1]))
    return dx_MD.astype(dy_AD.dtype), None, None


repeat_sorted.defvjp(
    lambda x_MD, order_A, inverse_MK: (repeat_sorted(x_MD, order_A, inverse_MK), (inverse_MK,)), _repeat_bwd
)


def sorted_experts(p: Params, x_MD: Array, routing: Routing) -> Array:
    M, K = routing.experts_MK.shape
    E = p["gate"].shape[0]
    expert_A = routing.experts_MK.reshape(-1)
    order_A = jnp.argsort(expert_A)
    inverse_A = jnp.zeros_like(order_A).at[order_A].set(jnp.arange(M * K, dtype=order_A.dtype), unique_indices=True)
    sizes_E = jnp.zeros(E, jnp.int32).at[expert_A].add(1)

    x_AD = repeat_sorted(x_MD, order_A, inverse_A.reshape(M, K))
    h_AF = swiglu(grouped_matmul(x_AD, p["gate"], sizes_E), grouped_matmul(x_AD, p["up"], sizes_E))
    y_AD = grouped_matmul(h_AF, p["down"], sizes_E)
    y_MKD = permute(y_AD, inverse_A, order_A).reshape(M, K, -1)
    return jnp.einsum("MKD,MK->MD", y_MKD.astype(jnp.float32), routing.weights_MK).astype(x_MD.dtype)


def looped_experts(p: Params, x_MD: Array, routing: Routing) -> Array:
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for e in range(p["gate"].shape[0]):
        weight_M = jnp.sum(jnp.where(routing.experts_MK == e, routing.weights_MK, 0), axis=-1)
        h_MF = swiglu(contract("MD,DF->MF", x_MD, p["gate"][e]), contract("MD,DF->MF", x_MD, p["up"][e]))
        y_MD += weight_M[:, None] * contract("MF,FD->MD", h_MF, p["down"][e]).astype(jnp.float32)
    return y_MD.astype(x_MD.dtype)


EXPERT_PATHS = {"sorted": sorted_experts, "looped": looped_experts}


def run(p: Params, cfg: ModelConfig, x_MD: Array, routing: Routing) -> Array:
    if cfg.experts not in EXPERT_PATHS:
        raise UserError(f"unknown model.experts {cfg.experts!r}; there are {', '.join(EXPERT_PATHS)}")
    return EXPERT_PATHS[cfg.experts](p, x_MD, routing)
