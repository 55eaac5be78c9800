"""Copies of the model, along the mesh's "data" axis: apart within a step, together at its end.

Each copy works on its own sequences, as a program whose "data" axis is manual and whose other axes are the compiler's;
what the copies found is added up once a step, however many microbatches there were: the network between slices carries
every gradient once, in pieces as small as they lie on a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

AXIS = "data"


def inside(mesh: Mesh) -> Mesh | AbstractMesh:
    """``mesh`` for the operations within a copy."""
    if mesh.shape[AXIS] == 1:
        return mesh
    types = tuple(AxisType.Manual if axis == AXIS else AxisType.Auto for axis in mesh.axis_names)
    return mesh.abstract_mesh.update(axis_types=types)


def run(mesh: Mesh, f: Callable, params: Any, batch: Any, whole: Any) -> Any:
    """``f(params, batch, whole)`` in every copy, on its part of the batch's rows; f has to return the same in all."""
    same, rows = PartitionSpec(), PartitionSpec(AXIS)
    return jax.shard_map(f, mesh=mesh, axis_names={AXIS}, in_specs=(same, rows, same), out_specs=same, check_vma=False)(
        params, batch, whole
    )


def total(x: jax.Array) -> jax.Array:
    if x.dtype != jnp.bfloat16:
        return jax.lax.psum(x, AXIS)
    return jax.lax.platform_dependent(x, cpu=_total_in_f32, default=partial(jax.lax.psum, axis_name=AXIS))


def _total_in_f32(x: jax.Array) -> jax.Array:
    """XLA:CPU aborts on an all-reduce in bf16 where some axes of the mesh are the compiler's."""
    return jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype)


def largest(x: jax.Array) -> jax.Array:
    return jax.lax.pmax(x, AXIS)
