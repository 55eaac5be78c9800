"""Where parameters lie: the tables from logical axes to mesh axes.

Layers name logical axes; nothing but this file says which of them a mesh splits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.dims import EXPERTS, HEADS, VOCAB, ParamSpec, Specs, is_spec
from kimi_jax.errors import UserError
from kimi_jax.sharding.mesh import GATHERED

Rules = Mapping[str, tuple[str, ...]]  # logical axis -> mesh axes that split it; what is not here is whole everywhere

TRAIN: Rules = {  # a mesh axis goes to the first in this table that asks for it
    EXPERTS: ("expert",),
    HEADS: ("tensor",),
    "mlp": ("tensor",),
    "expert_mlp": ("tensor",),
    VOCAB: ("tensor",),
    "embed": (*GATHERED, "expert"),
    "q_lora": (*GATHERED, "expert"),
    "kv_lora": (*GATHERED, "expert"),
}
LOAD: Rules = {EXPERTS: ("expert",)}
SERVE: Rules = dict.fromkeys(
    (EXPERTS, HEADS, "mlp", "expert_mlp", VOCAB, "q_lora", "latent+rope_key", "router"), ("expert",)
)  # of the engine: every weight but the vectors is read by one device


def split(size: int, axes: Sequence[str], mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """Which of the mesh axes ``axes`` split a dimension of ``size``: all, unless that would be a whole copy's devices.

    XLA:TPU turns what is gathered from every device of a slice, or scattered to it, into a reduction of twice the
    bytes; so the largest of the axes is taken alone there.
    """
    if len(axes) < 2 or _devices(mesh, axes) < mesh.size // mesh.shape.get("data", 1):
        return tuple(axes)
    return (max(axes, key=lambda axis: (size % mesh.shape[axis] == 0, mesh.shape[axis])),)


def _devices(mesh: Mesh | AbstractMesh, axes: Sequence[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def partition(spec: ParamSpec, mesh: Mesh | AbstractMesh, rules: Rules, name: str = "parameter") -> PartitionSpec:
    """How ``mesh`` splits one parameter. An axis that is absent or of size 1 splits nothing; a vector stays whole."""
    if spec.is_vector:
        return PartitionSpec(*(None,) * len(spec.axes))
    found: list[Any] = [None] * len(spec.axes)
    free = {axis for axis, size in mesh.shape.items() if size > 1}
    for logical in (axis for axis in rules if axis in spec.names):
        i = spec.names.index(logical)
        taken = split(spec.shape[i], [axis for axis in rules[logical] if axis in free], mesh)
        n = _devices(mesh, taken)
        if spec.shape[i] % n:
            fits = [d for d in range(1, n + 1) if spec.shape[i] % d == 0 and n % d == 0]
            raise UserError(
                f"{name}: {spec.shape[i]} {logical} do not divide over {n} devices (mesh {' x '.join(taken)}); "
                f"a product of {' or '.join(map(str, fits))} would"
            )
        free -= set(rules[logical])
        found[i] = taken if len(taken) > 1 else taken[0] if taken else None
    return PartitionSpec(*found)


def shardings(specs: Specs, mesh: Mesh, rules: Rules = LOAD) -> Any:
    """A sharding for every parameter, in the structure of the parameters.

    If the mesh has an axis that splits anything, all its axes become Auto, whatever they were: the compiler follows the
    weights, since no layer names an axis.
    """
    if any(mesh.shape.get(axis, 1) > 1 for axes in rules.values() for axis in axes):
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))

    def one(path: Any, spec: ParamSpec) -> NamedSharding:
        return NamedSharding(mesh, partition(spec, mesh, rules, ".".join(key.key for key in path)))

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)
