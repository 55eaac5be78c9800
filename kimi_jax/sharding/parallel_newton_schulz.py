"""Newton-Schulz of matrices whose parts lie all over the mesh, each on as few devices as keeps all of them busy.

The matrices of a leaf are dealt out: they travel, in the dtype of the iteration, until every device has its share of
whole ones, and the results travel back the same way. Where there are fewer matrices than devices, each lies in blocks
on a grid: its rows over some axes of the mesh and its columns over others. Their number is filled up to what divides.
Scales come from the f32 matrices before they leave.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout as MemoryLayout
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.dims import Array, ParamSpec
from kimi_jax.optim.axes import Layout, leaf, matrices
from kimi_jax.optim.newton_schulz import WHOLE, Blocks, iterate, scaled, sum_of_squares
from kimi_jax.sharding.rules import TRAIN, partition

AXES = ("expert", "fsdp", "tensor", "context")  # not "data": every copy of the model does the same, slices apart
FLOPS_PER_BYTE = 3000  # that a device computes while a link moves a byte: about 300 Tflop/s against 100 GB/s


class Spread(NamedTuple):
    """Which mesh axes split the stack, the rows and the columns of the matrices of a leaf."""

    stack: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    @property
    def transposed(self) -> Spread:
        return Spread(self.stack, self.columns, self.rows)


def parallel_orthogonalised(mesh: Mesh) -> Callable[[Array, Layout, float, int, Any], Array]:
    """What takes the place of ``optim.orthogonalised`` on ``mesh``, for leaves that lie as ``rules.TRAIN`` says."""

    def orthogonalised(direction: Array, layout: Layout, rms: float, steps: int, dtype: Any) -> Array:
        spec = partition(ParamSpec(direction.shape, layout.axes), mesh, TRAIN)
        spread = _spread(spec, layout)

        def local(part: Array) -> Array:
            results = [
                _orthogonalised(m, spread, mesh, rms, steps, dtype).astype(part.dtype) for m in matrices(part, layout)
            ]
            return leaf(results, part.shape, layout)

        return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(direction)

    return orthogonalised


def _spread(spec: PartitionSpec, layout: Layout) -> Spread:
    def over(start: int, stop: int | None) -> tuple[str, ...]:
        names = (axes if isinstance(axes, tuple) else (axes,) for axes in spec[start:stop] if axes)
        return tuple(itertools.chain.from_iterable(names))

    columns = layout.stack + layout.rows
    return Spread(over(0, layout.stack), over(layout.stack, columns), over(columns, None))


def _orthogonalised(m: Array, spread: Spread, mesh: Mesh, rms: float, steps: int, dtype: Any) -> Array:
    """rms sqrt(max(n, m)) NewtonSchulz of this device's part of the matrices, of which it gets its part back."""
    x_Snm = m.reshape(-1, *m.shape[-2:])
    squares_S = lax.psum(sum_of_squares(x_Snm), (*spread.rows, *spread.columns))
    rows, columns = m.shape[-2] * _devices(mesh, spread.rows), m.shape[-1] * _devices(mesh, spread.columns)
    tall = rows > columns
    x_Snm = scaled(x_Snm, squares_S).astype(dtype)
    if tall:
        x_Snm, spread = x_Snm.swapaxes(1, 2), spread.transposed
    dealt = deal(len(x_Snm), min(rows, columns), max(rows, columns), spread, mesh)
    way_back: list[Callable[[Array], Array]] = []
    for axis in dealt.stack:
        x_Snm, back = _deal_stack(x_Snm, axis, spread)
        way_back.append(back)
    sides = [(1, axis) for axis in dealt.rows] + [(2, axis) for axis in dealt.columns]
    for side, axis in sorted(sides, key=lambda found: found[1] not in (*spread.rows, *spread.columns)):
        x_Snm, back = _deal_side(x_Snm, axis, side, spread)
        way_back.append(back)
    x_Snm = lax.map(lambda x_nm: iterate(x_nm[None], steps, _blocks(dealt))[0], x_Snm)  # what is f32 is small
    for back in reversed(way_back):
        x_Snm = back(x_Snm)
    if tall:  # in memory too: else the compiler would turn the whole stacks that the result is added to
        x_Snm = with_layout_constraint(x_Snm.swapaxes(1, 2), MemoryLayout((0, 1, 2)))
    return (rms * max(rows, columns) ** 0.5 * x_Snm.astype(jnp.float32)).reshape(m.shape)


def _blocks(dealt: Spread) -> Blocks:
    whole = WHOLE
    if dealt.rows:
        whole = whole._replace(all_rows=partial(lax.all_gather, axis_name=dealt.rows, axis=1, tiled=True))
    if dealt.columns:

        def own_columns(x_Snk: Array) -> Array:
            share = x_Snk.shape[2] // lax.axis_size(dealt.columns)
            return lax.dynamic_slice_in_dim(x_Snk, lax.axis_index(dealt.columns) * share, share, axis=2)

        whole = whole._replace(
            all_columns=partial(lax.all_gather, axis_name=dealt.columns, axis=2, tiled=True),
            own_columns=own_columns,
            sum_columns=partial(lax.psum, axis_name=dealt.columns),
        )
    return whole


def _devices(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _deal_stack(x_Snm: Array, axis: str, spread: Spread) -> tuple[Array, Callable[[Array], Array]]:
    """Splits the stack over ``axis``, which splits the matrices or nothing, and says how to undo it."""
    S, n = len(x_Snm), lax.axis_size(axis)
    x_Snm = jnp.pad(x_Snm, ((0, -S % n), (0, 0), (0, 0)))
    if axis in spread.rows or axis in spread.columns:
        side = 1 if axis in spread.rows else 2
        return _moved(x_Snm, axis, 0, side), lambda x: _moved(x, axis, side, 0)[:S]
    share = len(x_Snm) // n
    dealt = lax.dynamic_slice_in_dim(x_Snm, lax.axis_index(axis) * share, share)
    return dealt, lambda x: lax.all_gather(x, axis, tiled=True)[:S]


def _deal_side(x_Snm: Array, axis: str, side: int, spread: Spread) -> tuple[Array, Callable[[Array], Array]]:
    """Splits the rows (side 1) or columns (2) over ``axis``, if it does not already, and says how to undo it."""
    split_by, other = (spread.rows, spread.columns)[side - 1], 3 - side
    if axis in split_by:
        return x_Snm, lambda x: x
    if axis in (*spread.rows, *spread.columns):
        return _moved(x_Snm, axis, side, other), lambda x: _moved(x, axis, other, side)
    share = x_Snm.shape[side] // lax.axis_size(axis)
    dealt = lax.dynamic_slice_in_dim(x_Snm, lax.axis_index(axis) * share, share, axis=side)
    return dealt, lambda x: lax.all_gather(x, axis, axis=side, tiled=True)


def _moved(x_Snm: Array, axis: str, split: int, joined: int) -> Array:
    """Splits one dimension over ``axis`` instead of another: a tiled all_to_all that XLA:CPU runs on any layout."""
    n, shape = lax.axis_size(axis), list(x_Snm.shape)
    parts = x_Snm.reshape(*shape[:split], n, shape[split] // n, *shape[split + 1 :])
    arrived = lax.all_to_all(jnp.moveaxis(parts, split, 0), axis, 0, 0)
    shape[split], shape[joined] = shape[split] // n, shape[joined] * n
    return jnp.moveaxis(arrived, 0, joined).reshape(shape)


def deal(S: int, n: int, m: int, now: Spread, mesh: Mesh) -> Spread:
    """Which axes are to split S matrices, their n rows and m columns, n <= m: what takes a device the least time.

    S counts the matrices that a device has part of. Axes that split the stack already are not dealt.
    """
    axes = [axis for axis in AXES if mesh.shape[axis] > 1 and axis not in now.stack]
    choices = []
    for sides in itertools.product(range(3), repeat=len(axes)):
        dealt = Spread(*(tuple(axis for axis, s in zip(axes, sides, strict=True) if s == side) for side in range(3)))
        if _divides(n, m, now, dealt, mesh):
            by_S, by_n, by_m = (_devices(mesh, over) for over in dealt)
            flops = (4 * n * n * m + 2 * n**3) / (by_n * by_m)
            rows = 2 * n * (m + n) / by_m * (1 - 1 / by_n) * (2 if by_n == mesh.size else 1)  # see rules.split
            columns = (8 + 2) * n * n / by_n * (1 - 1 / by_m)
            time = math.ceil(S / by_S) * (flops + FLOPS_PER_BYTE * (rows + columns))
            choices.append((time, by_n * by_m, dealt))
    return min(choices)[2]


def _divides(n: int, m: int, now: Spread, dealt: Spread, mesh: Mesh) -> bool:
    """Whether the matrices can go from one spread to the other, an axis at a time, and be multiplied there."""

    def on_the_way(before: tuple[str, ...], after: tuple[str, ...]) -> int:
        return _devices(mesh, tuple({*after, *(axis for axis in before if axis not in dealt.stack)}))

    by_m = _devices(mesh, dealt.columns)
    return not (n % on_the_way(now.rows, dealt.rows) or m % on_the_way(now.columns, dealt.columns) or n % by_m)
