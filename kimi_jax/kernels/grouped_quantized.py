"""Rows times the eight-bit matrix of their group, as one TPU kernel that reads a matrix once and only if it has rows.

    y_r = x_r (values[g] * scale[g])     g: the group of row r

    x_RX [rows, X]   values_GXY [groups, X, Y] in e4m3 or int8   scale_Gxy [groups, ceil(X / block), ceil(Y / block)]

With few rows such a product is bound by reading the matrices, so they travel to VMEM in eight bits and are cast there.
A scale is constant along a block of X: it multiplies the block's product in f32 rather than every weight.

``tiles`` lays the rows out: each group starts at a tile of its own. The grid walks Y outside and row tiles inside;
neighbouring tiles of a group find its matrix in VMEM, and tiles past the last repeat it and compute nothing.
``grouped_plain`` is the same without blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kimi_jax.dims import Array

FEWEST, MOST = 16, 128  # rows of a tile
LANES = 128
TILE_BYTES = 4 << 20  # of a matrix that are in VMEM at a time, twice
ROW_BYTES = 8 << 20  # rows of no more are in VMEM all the time; others are read again for every tile of columns
STEP = 512  # of X that is cast at a time, where a scale holds for more


class Tiles(NamedTuple):
    """Row a of the rows sorted by group stands at ``slot_A[a]``, past the end if it has no group."""

    group_I: Array  # of every tile
    count: Array  # of tiles that hold rows
    slot_A: Array
    rows: int  # of a tile

    @property
    def n_slots(self) -> int:
        return self.group_I.shape[0] * self.rows


def tiles(sizes_E: Array, n_rows: int) -> Tiles:
    """For the first sum(sizes) of ``n_rows`` rows, in the order of their groups."""
    (E,) = sizes_E.shape
    rows = min(max(FEWEST, 1 << (max(n_rows // E, 1) - 1).bit_length()), MOST)
    I = max((n_rows + (rows - 1) * min(E, n_rows)) // rows, 1)  # noqa: E741
    tiles_E, ends_E, a_A = -(-sizes_E // rows), jnp.cumsum(sizes_E), jnp.arange(n_rows)
    last_E = jnp.cumsum(tiles_E)
    group_A = jnp.minimum(jnp.searchsorted(ends_E, a_A, side="right"), E - 1)
    slot_A = ((last_E - tiles_E) * rows - (ends_E - sizes_E))[group_A] + a_A
    i_I = jnp.minimum(jnp.arange(I), jnp.maximum(last_E[-1] - 1, 0))
    group_I = jnp.minimum(jnp.searchsorted(last_E, i_I, side="right"), E - 1).astype(jnp.int32)
    return Tiles(group_I, last_E[-1].astype(jnp.int32), jnp.where(a_A < ends_E[-1], slot_A, I * rows), rows)


def grouped_plain(
    x_RX: Array, values_GXY: Array, scale_Gxy: Array, group_I: Array, count: Array, *, blocks: tuple[int, int]
) -> Array:
    _, X, Y = values_GXY.shape

    def one(tile: tuple[Array, Array]) -> Array:
        x_rX, g = tile
        scale_XY = scale_Gxy[g][jnp.arange(X)[:, None] // blocks[0], jnp.arange(Y) // blocks[1]]
        w_XY = (values_GXY[g].astype(jnp.float32) * scale_XY).astype(x_RX.dtype)
        return _product(x_rX, w_XY).astype(x_RX.dtype)

    return lax.map(one, (x_RX.reshape(len(group_I), -1, X), group_I)).reshape(-1, Y)


def grouped(
    x_RX: Array, values_GXY: Array, scale_Gxy: Array, group_I: Array, count: Array, *, blocks: tuple[int, int],
    most: int, interpret: Any = False,
) -> Array:  # fmt: skip
    """y [R, Y] in the dtype of ``x``; what it holds past the last tile with rows means nothing.

    ``blocks``: of X and of Y. On a TPU, blocks of X are of a multiple of 128, or all of it. ``most``: groups that may
    have rows, which the kernel declares to read.
    """
    (_, X, Y), n_tiles = values_GXY.shape, len(group_I)
    rows, y = len(x_RX) // n_tiles, _tile_of(Y, X)
    wide = scale_Gxy.shape[2] == Y  # a scale for every column
    lies = not wide and scale_Gxy.shape[1] > scale_Gxy.shape[2]  # the longer side is what XLA keeps in lanes
    scale_Guv = scale_Gxy.swapaxes(1, 2) if lies else scale_Gxy
    _, u, v = scale_Guv.shape
    tile = lambda i, count: jnp.minimum(i, jnp.maximum(count[0] - 1, 0))  # noqa: E731
    x_IrX = x_RX.reshape(n_tiles, rows, X)
    if x_RX.nbytes <= ROW_BYTES:
        x_spec, reads = pl.BlockSpec(x_IrX.shape, lambda j, i, group, count: (0, 0, 0)), 1
    else:
        x_spec, reads = pl.BlockSpec((1, rows, X), lambda j, i, group, count: (tile(i, count), 0, 0)), Y // y
    return pl.pallas_call(
        partial(_kernel, blocks=blocks, wide=wide, lies=lies),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(Y // y, n_tiles),
            in_specs=[
                x_spec,
                pl.BlockSpec((1, X, y), lambda j, i, group, count: (group[i], 0, j)),
                pl.BlockSpec((1, u, y if wide else v), lambda j, i, group, count: (group[i], 0, j if wide else 0)),
            ],
            out_specs=pl.BlockSpec((rows, y), lambda j, i, group, count: (tile(i, count), j)),
        ),
        out_shape=jax.ShapeDtypeStruct((len(x_RX), Y), x_RX.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=4 * (TILE_BYTES + ROW_BYTES)
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * len(x_RX) * X * Y,
            transcendentals=0,
            bytes_accessed=most * X * Y + len(x_RX) * (X * reads + Y) * x_RX.dtype.itemsize,
        ),
        interpret=interpret,
        name="grouped_quantized",
    )(group_I, count.reshape(1), x_IrX, values_GXY, scale_Guv)


def _tile_of(Y: int, X: int) -> int:
    """The most columns, in whole lanes, that divide Y and whose eight-bit weights fit."""
    fits = [y for y in range(LANES, Y + 1, LANES) if Y % y == 0 and X * y <= TILE_BYTES]
    return max(fits, default=LANES if Y % LANES == 0 else Y)


def _kernel(group_I, count_1, x_IrX, values_1Xy, scale_1uv, y_ry, *, blocks: tuple[int, int], wide: bool, lies: bool):
    j, i, (I, rows, X), y = pl.program_id(0), pl.program_id(1), x_IrX.shape, y_ry.shape[1]  # noqa: E741
    tile = 0 if I == 1 else i

    @pl.when(i < count_1[0])
    def _():
        scale_xy = scale_1uv[0] if wide else _spread(scale_1uv[0], lies, j * y, y, blocks[1])
        total_ry = jnp.zeros((rows, y), jnp.float32)
        for k, start in enumerate(range(0, X, blocks[0])):
            stop = min(start + blocks[0], X)
            part_ry = jnp.zeros((rows, y), jnp.float32)
            for at in range(start, stop, STEP):
                own = slice(at, min(at + STEP, stop))
                part_ry += _product(x_IrX[tile, :, own], values_1Xy[0, own].astype(x_IrX.dtype))
            total_ry += part_ry * scale_xy[k : k + 1]
        y_ry[...] = total_ry.astype(y_ry.dtype)


def _spread(scale_uv: Array, lies: bool, first: Array, n: int, block: int) -> Array:
    """The scales [x, n] of the columns from ``first`` on: a product with zeros and ones, which is exact."""
    axis = 0 if lies else 1
    shape = (scale_uv.shape[axis], n)
    column, own = first + lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)
    return _product(scale_uv, (column // block == own).astype(jnp.float32), axis)


def _product(x: Array, y: Array, axis: int = 1) -> Array:
    """Over the axis of x named and the first of y, accumulated in f32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((axis,), (0,)), ((), ())), precision, jnp.float32)
