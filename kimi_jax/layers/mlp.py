"""The gated feed-forward layer: y = (silu(x W_gate) * (x W_up)) W_down (SwiGLU, arXiv 2002.05202)."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kimi_jax.dims import Array, Params, ParamSpec, Specs
from kimi_jax.layers.linear import contract


def specs(D: int, F: int, std: float, width: str = "mlp") -> Specs:
    """``width``: the logical name of the axis of F."""
    return {
        "gate": ParamSpec((D, F), ("embed", width), std),
        "up": ParamSpec((D, F), ("embed", width), std),
        "down": ParamSpec((F, D), (width, "embed"), std),
    }


@partial(jax.checkpoint, prevent_cse=False)  # keeps gate and up alone for the backward pass
def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up, computed in f32 and returned in the dtype of the operands."""
    gate_f32 = gate.astype(jnp.float32)
    return (jax.nn.silu(gate_f32) * up.astype(jnp.float32)).astype(gate.dtype)


def mlp(p: Params, x_BTD: Array) -> Array:
    h_BTF = swiglu(contract("BTD,DF->BTF", x_BTD, p["gate"]), contract("BTD,DF->BTF", x_BTD, p["up"]))
    return contract("BTF,FD->BTD", h_BTF, p["down"])
