"""Experts without drops: every assignment of a token to an expert is computed, whatever the balance.

    y = sum_k w_k SwiGLU(x; expert e_k) + SwiGLU(x; shared expert)

For the routed ones there are three ways to the same numbers, all summing over k in f32: ``looped_experts`` is the plain
one; ``ragged_experts`` sorts the assignments and runs ``lax.ragged_dot``, a single kernel on TPU; on CPU, where that
costs as much as every expert applied to every token, ``blocked_experts`` walks the experts. The platform is chosen
inside forward and inside backward, which keep the same things in between: differentiating through the choice would keep
what either needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, Array, Params, ParamSpec, Specs
from kimi_jax.errors import UserError
from kimi_jax.layers import blocked_experts, mlp, ragged_experts
from kimi_jax.layers.blocked_experts import ladder
from kimi_jax.layers.dispatch import Hidden
from kimi_jax.layers.linear import contract


def specs(cfg: ModelConfig) -> Specs:
    """``experts``: a stack of the routed ones; ``shared``, if there are any: those that every token goes to, as one."""
    E, D, F, std = cfg.n_routed_experts, cfg.hidden_size, cfg.moe_intermediate_size, cfg.initializer_range
    routed = {
        "gate": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "up": ParamSpec((E, D, F), (EXPERTS, "embed", "expert_mlp"), std),
        "down": ParamSpec((E, F, D), (EXPERTS, "expert_mlp", "embed"), std),
    }
    if not cfg.n_shared_experts:
        return {"experts": routed}
    return {"experts": routed, "shared": mlp.specs(D, F * cfg.n_shared_experts, std, "expert_mlp")}


def looped_experts(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    y_MD = jnp.zeros(x_MD.shape, jnp.float32)
    for e in range(p["gate"].shape[0]):
        weight_M = jnp.sum(jnp.where(experts_MK == e, weights_MK, 0), axis=-1)
        h_MF = mlp.swiglu(contract("MD,DF->MF", x_MD, p["gate"][e]), contract("MD,DF->MF", x_MD, p["up"][e]))
        y_MD += weight_M[:, None] * contract("MF,FD->MD", h_MF, p["down"][e]).astype(jnp.float32)
    return y_MD.astype(x_MD.dtype)


class Path(NamedTuple):
    """One way: ``forward(p, x, weights, experts) -> y, hidden``; ``backward(p, x, weights, hidden, dy) -> dp, dx,
    dweights``, dp in f32."""

    forward: Callable
    backward: Callable


def _differentiable(path: Path) -> Callable:
    @jax.custom_vjp
    def experts(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
        return path.forward(p, x_MD, weights_MK, experts_MK)[0]

    def fwd(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array):
        y_MD, hidden = path.forward(p, x_MD, weights_MK, experts_MK)
        return y_MD, (p, x_MD, weights_MK, hidden)

    def bwd(residuals, dy_MD: Array):
        dp, dx_MD, dweights_MK = path.backward(*residuals, dy_MD)
        return {name: dp[name].astype(w.dtype) for name, w in residuals[0].items()}, dx_MD, dweights_MK, None

    experts.defvjp(fwd, bwd)
    return experts


def _fastest(on_cpu: Callable, elsewhere: Callable) -> Callable:
    """Whichever suits the platform that the program is compiled for."""
    return lambda *args: lax.platform_dependent(*args, cpu=on_cpu, default=elsewhere)


def fastest_experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """``fastest`` with the weights of one layer of a stack [L, E, ...]: for decoding, not differentiable."""
    choice = _fastest(blocked_experts.blocked_experts_of, ragged_experts.ragged_experts_of)
    return choice(stack, layer, x_MD, weights_MK, experts_MK)


def _ragged_forward(p: Params, x_MD: Array, weights_MK: Array, experts_MK: Array) -> tuple[Array, Hidden]:
    """With as many rows past the last as the blocked path keeps."""
    y_MD, hidden = ragged_experts.forward(p, x_MD, weights_MK, experts_MK)
    E, D, F = p["gate"].shape
    past = ((0, ladder(experts_MK.size, E, D * F)[-1]), (0, 0))
    return y_MD, hidden._replace(gate_AF=jnp.pad(hidden.gate_AF, past), up_AF=jnp.pad(hidden.up_AF, past))


def _ragged_backward(p: Params, x_MD: Array, weights_MK: Array, hidden: Hidden, dy_MD: Array):
    A = weights_MK.size
    hidden = hidden._replace(gate_AF=hidden.gate_AF[:A], up_AF=hidden.up_AF[:A])
    return ragged_experts.backward(p, x_MD, weights_MK, hidden, dy_MD)


BLOCKED = Path(blocked_experts.forward, blocked_experts.backward)
RAGGED = Path(ragged_experts.forward, ragged_experts.backward)
FASTEST = Path(_fastest(BLOCKED.forward, _ragged_forward), _fastest(BLOCKED.backward, _ragged_backward))

EXPERT_PATHS = {
    "fastest": _differentiable(FASTEST),
    "blocked": _differentiable(BLOCKED),
    "ragged": _differentiable(RAGGED),
    "looped": looped_experts,
}


def with_shared(p: Params, x_BTD: Array, y_BTD: Array) -> Array:
    """y of the routed experts and what the shared ones add to it."""
    return y_BTD + mlp.mlp(p["shared"], x_BTD) if "shared" in p else y_BTD


def run(p: Params, cfg: ModelConfig, x_BTD: Array, weights_BTK: Array, experts_BTK: Array) -> Array:
    """All experts of a layer, by the path that the config names."""
    if cfg.experts not in EXPERT_PATHS:
        raise UserError(f"unknown model.experts {cfg.experts!r}; there are {', '.join(EXPERT_PATHS)}")
    x_MD, weights_MK, experts_MK = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTK, experts_BTK))
    y_MD = EXPERT_PATHS[cfg.experts](p["experts"], x_MD, weights_MK, experts_MK)
    return with_shared(p, x_BTD, y_MD.reshape(x_BTD.shape))
