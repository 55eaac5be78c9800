"""Orthogonalisation of a stack of matrices by Newton-Schulz iteration."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(stack: Array, steps: int = 5, dtype=jnp.bfloat16) -> Array:
    """U V^T, roughly, of every matrix U S V^T in ``stack`` [..., n, m] (Moonlight, arXiv 2502.16982, section 2.1).

        X_0 = M / (||M||_F + 1e-7)
        X  <- a X + b (X X^T) X + c (X X^T)^2 X,    (a, b, c) = (3.4445, -4.7750, 2.0315),    ``steps`` times

    M is transposed so that X X^T is the smaller Gram matrix. The coefficients trade exactness for speed: after five
    steps the singular values of a Gaussian matrix lie in [0.68, 1.21], not at 1. Operands of the products are in
    ``dtype`` and sums in float32 (all of it float32, at the highest precision, when ``dtype`` is float32).
    A zero matrix stays zero. Returns the dtype of ``stack``.
    """
    *stacked, n, m = stack.shape

    def orthogonalise(x):
        x = jnp.swapaxes(x, -1, -2) if n > m else x
        norm = jnp.linalg.norm(x.astype(jnp.promote_types(dtype, jnp.float32)), axis=(-2, -1), keepdims=True)
        x = (x / (norm + 1e-7)).astype(dtype)
        x = lax.fori_loop(0, steps, lambda _, x: _step(x), x)
        return jnp.swapaxes(x, -1, -2) if n > m else x

    def one_by_one(x):  # a CPU keeps one matrix in its cache; accelerators want the whole batch
        return lax.map(orthogonalise, x.reshape(-1, n, m)).reshape(*stacked, n, m)

    return lax.platform_dependent(stack.astype(dtype), cpu=one_by_one, default=orthogonalise).astype(stack.dtype)


def _step(x: Array) -> Array:
    a, b, c = COEFFICIENTS
    gram = _product("...ij,...kj->...ik", x, x).astype(x.dtype)
    polynomial = (b * gram + c * _product("...ij,...jk->...ik", gram, gram)).astype(x.dtype)
    return (a * x + _product("...ij,...jk->...ik", polynomial, x)).astype(x.dtype)


def _product(subscripts: str, x: Array, y: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if x.dtype == wide else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=wide)
