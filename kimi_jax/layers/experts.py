"""Routed experts without drops: every assignment of a token to an expert is computed, whatever the balance.

    y = sum_k w_k SwiGLU(x; expert e_k)

Three ways to the same numbers, all summing over k in f32: ``looped_experts`` is the plain one; ``ragged_experts``
sorts the assignments and runs ``lax.ragged_dot``, a single kernel on TPU; on CPU, where that costs as much as every
expert applied to every token, ``blocked_experts`` walks the experts.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, Array, Params, ParamSpec, Specs
from kimi_jax.errors import UserError
from kimi_jax.layers.blocked_experts import blocked_experts, blocked_experts_of
from kimi_jax.layers.dispatch import combine, gather_tokens, sort_assignments, unsort
from kimi_jax.layers.linear import contract
from kimi_jax.layers.mlp import swiglu


def specs(cfg: ModelConfig) -> Specs:
    E, D, F, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.initializer_range
    return {
        "gate": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "up": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "down": ParamSpec((E, F, D), (EXPERTS, "expert_mlp", "embed"), std),
    }


def looped_experts(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for e in range(p["gate"].shape[0]):
        weight_M = jnp.sum(jnp.where(experts_MK == e, weights_MK, 0), axis=-1)
        h_MF = swiglu(contract("MD,DF->MF", x_MD, p["gate"][e]), contract("MD,DF->MF", x_MD, p["up"][e]))
        y_MD += weight_M[:, None] * contract("MF,FD->MD", h_MF, p["down"][e]).astype(jnp.float32)
    return y_MD.astype(x_MD.dtype)


def ragged_experts(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    order = sort_assignments(experts_MK, p["gate"].shape[0])
    precision = lax.Precision.HIGHEST if x_MD.dtype == jnp.float32 else None

    def grouped(x_AX: Array, w_EXY: Array) -> Array:
        w_EXY = w_EXY.astype(x_AX.dtype)
        y_AY = lax.ragged_dot(x_AX, w_EXY, order.sizes_E, precision=precision, preferred_element_type=jnp.float32)
        return y_AY.astype(x_AX.dtype)

    x_AD = gather_tokens(x_MD, order)
    y_AD = grouped(swiglu(grouped(x_AD, p["gate"]), grouped(x_AD, p["up"])), p["down"])
    return combine(unsort(y_AD, order), weights_MK).astype(x_MD.dtype)


def fastest_experts(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """Whichever of the two fast ways suits the platform that the program is compiled for."""
    return lax.platform_dependent(p, x_MD, weights_MK, experts_MK, cpu=blocked_experts, default=ragged_experts)


def fastest_experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """``fastest_experts`` with the weights of one layer of a stack [L, E, ...]: for decoding, not differentiable."""

    def indexed(stack: Params, layer: Array, *args: Array) -> Array:
        return ragged_experts({name: w[layer] for name, w in stack.items()}, *args)

    return lax.platform_dependent(stack, layer, x_MD, weights_MK, experts_MK, cpu=blocked_experts_of, default=indexed)


EXPERT_PATHS = {
    "fastest": fastest_experts,
    "blocked": blocked_experts,
    "ragged": ragged_experts,
    "looped": looped_experts,
}


def run(p: Params, cfg: ModelConfig, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    if cfg.experts not in EXPERT_PATHS:
        raise UserError(f"unknown model.experts {cfg.experts!r}; there are {', '.join(EXPERT_PATHS)}")
    return EXPERT_PATHS[cfg.experts](p, x_MD, weights_MK, experts_MK)
