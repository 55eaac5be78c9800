"""Newton–Schulz with every matrix on as few devices as keeps all of them busy.

A stack of S matrices whose parts lie all over the mesh is dealt out: S over some axes of the mesh, and, where there are
fewer matrices than devices, the rows of each over the others. One exchange brings the matrices together and one takes
the results back; with rows split, every product gathers its second factor. S is padded to what divides.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.dims import Array
from kimi_jax.optim.newton_schulz import iterate

AXES = ("expert", "fsdp", "tensor", "context")  # not "data": every copy of the model does the same, slices apart


def parallel_newton_schulz(mesh: Mesh) -> Callable[[Array, int, Any], Array]:
    """What takes the place of ``optim.newton_schulz`` on ``mesh``."""

    def orthogonalise(m: Array, steps: int, dtype: Any) -> Array:
        *stack, n, k = m.shape
        x = (m.swapaxes(-1, -2) if n > k else m).astype(jnp.float32)
        last_first = (
            *reversed(range(len(stack))),
            len(stack),
            len(stack) + 1,
        )  # experts, which are split, before layers
        x_Snm = x.transpose(last_first).reshape(-1, *x.shape[-2:])
        S = x_Snm.shape[0]
        over_S, over_n = deal(S, min(n, k), mesh)
        padded = -S % math.prod(mesh.shape[axis] for axis in over_S)
        where = NamedSharding(mesh, PartitionSpec(over_S, over_n, None))
        place = partial(jax.lax.with_sharding_constraint, shardings=where)
        x_Snm = iterate(place(jnp.pad(x_Snm, ((0, padded), (0, 0), (0, 0)))), steps, dtype, place)[:S]
        x = x_Snm.reshape(*reversed(stack), *x.shape[-2:]).transpose(last_first)
        return (x.swapaxes(-1, -2) if n > k else x).astype(m.dtype)

    return orthogonalise


def deal(S: int, n: int, mesh: Mesh) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that S is split over, and those that n is: the fewest for n with nearly the least work per device."""
    axes = [axis for axis in AXES if mesh.shape[axis] > 1]
    choices = []
    for kept in itertools.product((True, False), repeat=len(axes)):
        over_S = tuple(axis for axis, on_S in zip(axes, kept, strict=True) if on_S)
        over_n = tuple(axis for axis in axes if axis not in over_S)
        by_S, by_n = (math.prod(mesh.shape[axis] for axis in chosen) for chosen in (over_S, over_n))
        if n % by_n == 0:
            choices.append((math.ceil(S / by_S) / by_n, by_n, over_S, over_n))
    least = min(work for work, *_ in choices)
    _, _, over_S, over_n = min((c for c in choices if c[0] <= 1.2 * least), key=lambda c: c[1])
    return over_S, over_n
