"""Matrix products: low-precision operands, f32 accumulation, and gradients in the same manner."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from kimi_jax.dims import Array


def product(spec: str, x: Array, y: Array) -> Array:
    """``jnp.einsum(spec, x, y)`` accumulated and returned in f32; f32 operands are multiplied in full precision."""
    full = x.dtype == jnp.float32
    return jnp.einsum(
        spec, x, y, precision=lax.Precision.HIGHEST if full else None, preferred_element_type=jnp.float32
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, x: Array, w: Array) -> Array:
    """``einsum(spec, x, w)`` of activations and weights, in the dtype of ``x``, accumulated in f32.

    The weights are cast on the way in, and their gradient comes out of the product in their own dtype without passing
    through that of ``x``. No index may occur in one operand only.
    """
    return product(spec, x, w.astype(x.dtype)).astype(x.dtype)


def _contract_fwd(spec: str, x: Array, w: Array):
    return contract(spec, x, w), (x, w)


def _contract_bwd(spec: str, residuals, dy: Array):
    x, w = residuals
    inputs, y_axes = spec.split("->")
    x_axes, w_axes = inputs.split(",")
    dx = product(f"{y_axes},{w_axes}->{x_axes}", dy, w.astype(x.dtype)).astype(x.dtype)
    dw = weight_gradient(f"{x_axes},{y_axes}->{w_axes}", x, dy).astype(w.dtype)
    return dx, dw


contract.defvjp(_contract_fwd, _contract_bwd)


def weight_gradient(spec: str, x: Array, dy: Array) -> Array:
    """``product(spec, x, dy)`` over the leading (token) axes of both.

    XLA:CPU multiplies bf16 at full speed only when the contracted axis of the first operand is minor in memory: there,
    the transpose is made explicitly (measured: 2.2 times faster).
    """
    if x.dtype != jnp.bfloat16:
        return product(spec, x, dy)
    x_axes, rest = spec.split(",", 1)
    summed = [axis for axis in x_axes if axis not in rest.split("->")[1]]
    kept = [axis for axis in x_axes if axis not in summed]
    order = [x_axes.index(axis) for axis in kept + summed]

    def transposed(x: Array, dy: Array) -> Array:
        x_minor = with_layout_constraint(x.transpose(order), Layout(tuple(range(x.ndim))))
        return product(f"{''.join(kept + summed)},{rest}", x_minor, dy)

    return lax.platform_dependent(x, dy, cpu=transposed, default=partial(product, spec))
