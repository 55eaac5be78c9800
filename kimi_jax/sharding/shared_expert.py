"""The shared expert, computed while rows of the routed ones travel.

The compiler computes nothing of what stands outside of a loop while rows travel inside, so this has to stand inside;
and left alone, it computes it before or after. So the last products and an exchange form a group: what bears its
number is scheduled beside the exchange. A group's products must not depend on each other. On CPU the number says
nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from kimi_jax.dims import Array, Params
from kimi_jax.layers.linear import contract, product, weight_gradient
from kimi_jax.layers.mlp import swiglu

FORWARD, BACKWARD = 1, 2


def at_once(group: int) -> AbstractContextManager:
    return set_xla_metadata(_scheduling_group_id=str(group))


def forward(p: Params, x_BTD: Array) -> Array:
    h_BTF = swiglu(*(contract("BTD,DF->BTF", x_BTD, p[name]) for name in ("gate", "up")))
    with at_once(FORWARD):
        return contract("BTF,FD->BTD", h_BTF, p["down"])


def backward(p: Params, x_MD: Array, dy_MD: Array) -> tuple[Params, Array]:
    """Gradients of the weights in f32, and of x."""
    gate_up = [contract("MD,DF->MF", x_MD, p[name]) for name in ("gate", "up")]
    h_MF, swiglu_vjp = jax.vjp(swiglu, *gate_up)
    dgate_MF, dup_MF = swiglu_vjp(product("MD,FD->MF", dy_MD, p["down"]).astype(h_MF.dtype))
    with at_once(BACKWARD):
        dp = {
            "gate": weight_gradient("MD,MF->DF", x_MD, dgate_MF),
            "up": weight_gradient("MD,MF->DF", x_MD, dup_MF),
            "down": weight_gradient("MF,MD->FD", h_MF, dy_MD),
        }
        of_gate, of_up = (product("MF,DF->MD", *of) for of in ((dgate_MF, p["gate"]), (dup_MF, p["up"])))
    return dp, (of_gate + of_up).astype(x_MD.dtype)
