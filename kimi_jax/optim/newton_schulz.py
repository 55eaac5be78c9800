"""Newton–Schulz orthogonalisation of stacks of matrices (Moonlight, arXiv 2502.16982, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
PIECE_ELEMENTS = 2**20  # what the caches of a CPU core hold; a whole stack in one product is a third slower there


def newton_schulz(m: Array, steps: int = 5, dtype=jnp.bfloat16) -> Array:
    """Pushes the singular values of every matrix of a stack [..., n, m] towards 1, to about [0.7, 1.2] in 5 steps.

    X_0 = M / (||M||_F + 1e-7);  X <- a X + (b A + c A^2) X,  A = X X^T

    computed on the side with fewer rows. Factors of the products are in ``dtype``; sums and coefficients stay f32, for
    a is 3.4375 in bf16 and the singular values would leave their range. Returns the dtype of ``m``.
    """
    tall = m.shape[-2] > m.shape[-1]
    x_Snm = m.reshape(-1, *m.shape[-2:]).astype(jnp.float32)
    if tall:  # the barrier makes it a transpose in memory: XLA:CPU multiplies rows by columns several times faster
        x_Snm = lax.optimization_barrier(x_Snm.swapaxes(1, 2))
    whole = partial(_from_start, steps=steps, dtype=dtype)
    x_Snm = lax.platform_dependent(x_Snm, cpu=partial(_by_pieces, whole), default=whole)
    return (x_Snm.swapaxes(1, 2) if tall else x_Snm).reshape(m.shape).astype(m.dtype)


def _from_start(x_Snm: Array, steps: int, dtype) -> Array:
    return iterate(scaled(x_Snm, sum_of_squares(x_Snm)).astype(dtype), steps).astype(jnp.float32)


def _by_pieces(whole: Callable[[Array], Array], x_Snm: Array) -> Array:
    S, n, m = x_Snm.shape
    at_once = max(PIECE_ELEMENTS // (n * m), 1)
    if at_once >= S:
        return whole(x_Snm)
    return lax.map(lambda x_nm: whole(x_nm[None])[0], x_Snm, batch_size=at_once)


def sum_of_squares(x_Snm: Array) -> Array:
    return jnp.sum(jnp.square(x_Snm.astype(jnp.float32)), axis=(1, 2))


def scaled(x_Snm: Array, squares_S: Array) -> Array:
    """X_0, f32, from the sums of squares of the whole matrices."""
    return x_Snm.astype(jnp.float32) / (jnp.sqrt(squares_S)[:, None, None] + 1e-7)


class Blocks(NamedTuple):
    """How the blocks [rows, columns] of matrices, one on each device of a grid, find together."""

    all_rows: Callable[[Array], Array]  # [S, rows, x] -> [S, n, x]
    all_columns: Callable[[Array], Array]  # [S, x, columns] -> [S, x, all of them]
    own_columns: Callable[[Array], Array]  # [S, x, all of them] -> [S, x, columns]
    sum_columns: Callable[[Array], Array]  # sums what every block of columns contributes


def _itself(x: Array) -> Array:
    return x


WHOLE = Blocks(_itself, _itself, _itself, _itself)


def iterate(x_Snm: Array, steps: int, blocks: Blocks = WHOLE) -> Array:
    """The steps from X_0 on, for matrices of n rows, n <= m, in the dtype of X_0; x holds a block of each."""
    a, b, c = COEFFICIENTS
    dtype = x_Snm.dtype

    def step(_, x_Snm: Array) -> Array:
        x_Skm = blocks.all_rows(x_Snm)
        gram_Snk = blocks.sum_columns(_product("Snm,Skm->Snk", x_Snm, x_Skm))
        low_Snk = gram_Snk.astype(dtype)
        square_Snl = _product("Snk,Skl->Snl", low_Snk, blocks.all_rows(blocks.own_columns(low_Snk)))
        poly_Snk = (b * gram_Snk + c * blocks.all_columns(square_Snl)).astype(dtype)
        return (a * x_Snm.astype(jnp.float32) + _product("Snk,Skm->Snm", poly_Snk, x_Skm)).astype(dtype)

    return lax.fori_loop(0, steps, step, x_Snm)


def _product(spec: str, x: Array, y: Array) -> Array:
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(spec, x, y, precision=precision, preferred_element_type=jnp.float32)
