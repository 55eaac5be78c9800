"""Grouped matrix product: consecutive groups of rows, each with a matrix of its own.

    y[r] = x[r] W[g(r)],  group g owning sizes[g] consecutive rows

On TPU this is ``lax.ragged_dot``, one kernel. XLA:CPU has no such kernel (its ``ragged_dot`` costs as much as every
group applied to every row), so there the rows are walked in blocks that never cross a group: each block is one dense
product, and the number of blocks follows the sizes at run time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array
from kimi_jax.layers.linear import product, weight_gradient

MAX_BLOCK = 256


def block_rows(n_rows: int, n_groups: int) -> int:
    """Rows per block: about half a mean group, a power of two."""
    mean = max(n_rows // (2 * n_groups), 1)
    return min(1 << (mean - 1).bit_length(), MAX_BLOCK)


@jax.custom_vjp
def grouped_matmul(x_AD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """Rows of ``x_AD`` times their group's matrix, [A, F] in the dtype of ``x``, accumulated in f32.

    Rows past sum(sizes) belong to no group; what comes out there is zero or undefined and must not be read.
    """
    return lax.platform_dependent(x_AD, w_EDF, sizes_E, cpu=_blocked, default=_ragged)


def _grouped_fwd(x_AD: Array, w_EDF: Array, sizes_E: Array):
    return grouped_matmul(x_AD, w_EDF, sizes_E), (x_AD, w_EDF, sizes_E)


def _grouped_bwd(residuals, dy_AF: Array):
    x_AD, w_EDF, sizes_E = residuals
    dx_AD = lax.platform_dependent(dy_AF, w_EDF, sizes_E, cpu=_blocked_transposed, default=_ragged_transposed)
    dw_EDF = lax.platform_dependent(x_AD, dy_AF, sizes_E, cpu=_blocked_outer, default=_ragged_outer)
    return dx_AD, dw_EDF.astype(w_EDF.dtype), None


grouped_matmul.defvjp(_grouped_fwd, _grouped_bwd)


def reference(x_AD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    """The plain twin: every group applied to every row, rows of other groups masked."""
    ends_E = jnp.cumsum(sizes_E)
    row_A = jnp.arange(x_AD.shape[0])
    member_EA = (row_A >= (ends_E - sizes_E)[:, None]) & (row_A < ends_E[:, None])
    y_EAF = product("AD,EDF->EAF", x_AD, w_EDF.astype(x_AD.dtype))
    return jnp.sum(jnp.where(member_EA[..., None], y_EAF, 0), axis=0).astype(x_AD.dtype)


def _ragged(x_AD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    y_AF = lax.ragged_dot(
        x_AD, w_EDF.astype(x_AD.dtype), sizes_E, precision=_precision(x_AD), preferred_element_type=jnp.float32
    )
    return y_AF.astype(x_AD.dtype)


def _ragged_transposed(dy_AF: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _ragged(dy_AF, w_EDF.swapaxes(1, 2), sizes_E)


def _ragged_outer(x_AD: Array, dy_AF: Array, sizes_E: Array) -> Array:
    rows = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
    )
    return lax.ragged_dot_general(
        x_AD, dy_AF, sizes_E, rows, precision=_precision(x_AD), preferred_element_type=jnp.float32
    )


def _precision(x: Array) -> lax.Precision | None:
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


class _Blocks(NamedTuple):
    """Block i covers ``rows`` rows from ``start_I[i]``, of group ``group_I[i]``, which ends at ``end_I[i]``."""

    rows: int
    count: Array
    group_I: Array
    start_I: Array
    end_I: Array


def _blocks(n_rows: int, sizes_E: Array) -> _Blocks:
    E = sizes_E.shape[0]
    rows = block_rows(n_rows, E)
    per_group_E = -(-sizes_E // rows)
    last_E = jnp.cumsum(per_group_E)
    ends_E = jnp.cumsum(sizes_E)
    i_I = jnp.arange(n_rows // rows + E)
    group_I = jnp.minimum(jnp.searchsorted(last_E, i_I, side="right"), E - 1)
    start_I = (ends_E - sizes_E)[group_I] + (i_I - (last_E - per_group_E)[group_I]) * rows
    return _Blocks(rows, last_E[-1], group_I, start_I, ends_E[group_I])


def _walk(x_AX: Array, w_EDF: Array, sizes_E: Array, spec: str, width: int) -> Array:
    """Blocks in increasing order: what a block writes past the end of its group, the next group overwrites."""
    blocks = _blocks(x_AX.shape[0], sizes_E)
    x_AX = jnp.pad(x_AX, ((0, blocks.rows), (0, 0)))

    def step(i: Array, y_AY: Array) -> Array:
        x_block = lax.dynamic_slice_in_dim(x_AX, blocks.start_I[i], blocks.rows)
        w_DF = lax.dynamic_index_in_dim(w_EDF, blocks.group_I[i], keepdims=False).astype(x_AX.dtype)
        y_block = product(spec, x_block, w_DF).astype(x_AX.dtype)
        return lax.dynamic_update_slice_in_dim(y_AY, y_block, blocks.start_I[i], 0)

    y_AY = jnp.zeros((x_AX.shape[0], width), x_AX.dtype)
    return lax.fori_loop(0, blocks.count, step, y_AY)[: -blocks.rows]


def _blocked(x_AD: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _walk(x_AD, w_EDF, sizes_E, "AD,DF->AF", w_EDF.shape[2])


def _blocked_transposed(dy_AF: Array, w_EDF: Array, sizes_E: Array) -> Array:
    return _walk(dy_AF, w_EDF, sizes_E, "AF,DF->AD", w_EDF.shape[1])


def _blocked_outer(x_AD: Array, dy_AF: Array, sizes_E: Array) -> Array:
    blocks = _blocks(x_AD.shape[0], sizes_E)
    x_AD, dy_AF = (jnp.pad(a, ((0, blocks.rows), (0, 0))) for a in (x_AD, dy_AF))

    def step(i: Array, dw_EDF: Array) -> Array:
        own_A1 = (blocks.start_I[i] + jnp.arange(blocks.rows) < blocks.end_I[i])[:, None]
        x_block = jnp.where(own_A1, lax.dynamic_slice_in_dim(x_AD, blocks.start_I[i], blocks.rows), 0)
        dy_block = jnp.where(own_A1, lax.dynamic_slice_in_dim(dy_AF, blocks.start_I[i], blocks.rows), 0)
        dw_DF = lax.dynamic_index_in_dim(dw_EDF, blocks.group_I[i], keepdims=False)
        dw_DF += weight_gradient("AD,AF->DF", x_block, dy_block)
        return lax.dynamic_update_index_in_dim(dw_EDF, dw_DF, blocks.group_I[i], 0)

    dw_EDF = jnp.zeros((sizes_E.shape[0], x_AD.shape[1], dy_AF.shape[1]), jnp.float32)
    return lax.fori_loop(0, blocks.count, step, dw_EDF)
