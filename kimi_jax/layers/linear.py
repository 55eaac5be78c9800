"""Matrix products: low-precision operands, f32 accumulation, and gradients in the same manner."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from kimi_jax.dims import Array

FEW = 8  # rows of a product on CPU: reading the other operand is then all the work there is
LARGE, WIDEST, AT_ONCE = 2**20, 2**16, 8  # numbers in a large matrix, sums in the cache, rows of it at a time


class Split(NamedTuple):
    """How products with weights of which every device has a part come to be whole."""

    whole: Callable = lambda x, n: x  # all n columns, where a device has computed some
    total: Callable = lambda y: y  # the sum over devices, each of which has summed over a part


UNSPLIT = Split()


def product(spec: str, x: Array, y: Array) -> Array:
    """``jnp.einsum(spec, x, y)`` accumulated and returned in f32; f32 operands are multiplied in full precision."""
    few = _few_rows(spec, x)
    if x.dtype == jnp.bfloat16 and (few or spec != _plain(spec)):
        on_cpu = _f32_product if few else _plain_product
        return lax.platform_dependent(x, y, cpu=partial(on_cpu, spec), default=partial(_einsum, spec))
    return _einsum(spec, x, y)


def _few_rows(spec: str, x: Array) -> bool:
    mine = _axes(spec)[1]
    return math.prod(n for axis, n in zip(spec.split(",")[0], x.shape, strict=True) if axis in mine) <= FEW


def _f32_product(spec: str, x: Array, y: Array) -> Array:
    """The same numbers; XLA:CPU makes one copy of ``y`` at most, and none if it is large."""
    (x_axes, y_axes, out), (batch, mine, other, summed) = re.split(",|->", spec), _axes(spec)
    x_first, y_first = f"{batch}{mine}{summed}", batch + "".join(axis for axis in y_axes if axis not in batch)
    x = jnp.einsum(f"{x_axes}->{x_first}", x.astype(jnp.float32))
    if y.ndim == 2 and y_axes == summed + other and y.size > LARGE and y.shape[0] % AT_ONCE == 0:
        found = _sum_of_rows(x.reshape(-1, x.shape[-1]), y).reshape(*x.shape[:-1], -1)
    else:
        y = jnp.einsum(f"{y_axes}->{y_first}", y.astype(jnp.float32))
        y = lax.optimization_barrier(y) if y_first != y_axes else y  # else in an order that takes four times as long
        found = _einsum(f"{x_first},{y_first}->{batch}{mine}{other}", x, y)
    return jnp.einsum(f"{batch}{mine}{other}->{out}", found)


def _sum_of_rows(x_MD: Array, y_DV: Array) -> Array:
    """y's rows times x's columns, summed in one pass over ``y``; the sums, so many columns at a time, stay in cache."""
    (M, D), V = x_MD.shape, y_DV.shape[1]
    n = min(V, WIDEST // M)

    def columns(c: Array, out_MV: Array) -> Array:
        def rows(r: Array, sum_Mn: Array) -> Array:
            x_Ma = lax.dynamic_slice_in_dim(x_MD, r * AT_ONCE, AT_ONCE, axis=1)
            y_an = lax.dynamic_slice(y_DV, (r * AT_ONCE, c * n), (AT_ONCE, n)).astype(jnp.float32)
            for i in range(AT_ONCE):
                sum_Mn += x_Ma[:, i : i + 1] * y_an[i]
            return sum_Mn

        sum_Mn = lax.fori_loop(0, D // AT_ONCE, rows, jnp.zeros((M, n)))
        return lax.dynamic_update_slice(out_MV, sum_Mn, (0, c * n))  # the last columns start where they fit

    return lax.fori_loop(0, -(-V // n), columns, jnp.zeros((M, V)))


def _einsum(spec: str, x: Array, y: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)


def _axes(spec: str) -> tuple[str, str, str, str]:
    """The axes of x, y and the result, of x and the result, of y and the result, and of x and y (summed over)."""
    inputs, out = spec.split("->")
    x, y = inputs.split(",")
    batch = "".join(a for a in out if a in x and a in y)
    mine, other = ("".join(a for a in out if a in one and a not in batch) for one in (x, y))
    summed = "".join(a for a in x if a in y and a not in out)
    return batch, mine, other, summed


def _plain(spec: str) -> str:
    """The spec of the same product with x [batch, own, summed], y [batch, own, summed] or y [batch, summed, own] and a
    result [batch, x's own, y's own]."""
    batch, mine, other, summed = _axes(spec)
    y = spec.split("->")[0].split(",")[1]
    y = y if y == f"{batch}{other}{summed}" else f"{batch}{summed}{other}"
    return f"{batch}{mine}{summed},{y}->{batch}{mine}{other}"


def _plain_product(spec: str, x: Array, y: Array) -> Array:
    """The same as a plain product of operands that are transposed in memory before, of a result that is after.

    XLA:CPU else comes to products that it cannot run in bf16: those that sum over an axis of x that is not minor.
    """
    plain = _plain(spec)
    (x_axes, y_axes, out), (x_plain, y_plain, out_plain) = (re.split(",|->", s) for s in (spec, plain))
    product_plain = _einsum(plain, _in_order(x, x_axes, x_plain), _in_order(y, y_axes, y_plain))
    return _in_order(product_plain, out_plain, out)


def _in_order(x: Array, axes: str, wanted: str) -> Array:
    if axes == wanted:
        return x
    return lax.optimization_barrier(jnp.einsum(f"{axes}->{wanted}", lax.optimization_barrier(x)))


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


def transposed(x: Array) -> Array:
    """The last two axes swapped; on CPU also in memory, which XLA would otherwise avoid.

    XLA:CPU multiplies bf16 at full speed only if the contracted axis is minor in the first operand and not in the
    second (measured: 2.2 times faster for weight gradients, 3 times in batched products).
    """

    def in_memory(x: Array) -> Array:
        return with_layout_constraint(x.swapaxes(-1, -2), Layout(tuple(range(x.ndim))))

    return lax.platform_dependent(x, cpu=in_memory, default=lambda x: x.swapaxes(-1, -2))


def weight_gradient(spec: str, x: Array, dy: Array) -> Array:
    """``product(spec, x, dy)``: the gradient of weights from the layer's input and the gradient of its output."""
    inputs, w_axes = spec.split("->")
    x_axes, dy_axes = inputs.split(",")
    n = next(i for i, axis in enumerate(x_axes) if axis in w_axes)  # leading axes: tokens
    kept, new = x_axes[n:], dy_axes[n:]
    if x.dtype != jnp.bfloat16 or x_axes[:n] != dy_axes[:n] or set(kept) & set(new):
        return product(spec, x, dy)

    def flat(x: Array, dy: Array) -> Array:
        tokens = math.prod(x.shape[:n])
        dw = product("xm,my->xy", transposed(x.reshape(tokens, -1)), dy.reshape(tokens, -1))
        return jnp.einsum(f"{kept}{new}->{w_axes}", dw.reshape(*x.shape[n:], *dy.shape[n:]))

    return lax.platform_dependent(x, dy, cpu=flat, default=partial(_einsum, spec))
