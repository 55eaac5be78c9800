"""The mesh: five named axes over the devices of one or several slices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec

from kimi_jax.errors import UserError


@dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis has; ``data`` 0 takes all that the others leave.

    ``data``: whole copies of the model, over slices by the data-centre network. ``fsdp``: parameters and optimizer
    state split, gathered when used. ``expert``: each device holds some experts whole, and tokens travel. ``tensor``:
    heads and hidden units split. ``context``: sequences split, and parameters as by ``fsdp``.
    """

    data: int = 0
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    context: int = 1

    def __post_init__(self):
        for name, size in dataclasses.asdict(self).items():
            if size < (0 if name == "data" else 1):
                raise UserError(f"mesh.{name} must be at least {0 if name == 'data' else 1}, not {size}")


AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
BATCH = ("data", "fsdp", "expert")  # the axes over which the sequences of a batch are split
GATHERED = ("fsdp", "context")  # the axes that split weights which are gathered where they are used


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of ``BATCH`` that split what is at hand: inside one copy of the model (``copies``), not "data"."""
    return tuple(axis for axis in BATCH if axis not in mesh.manual_axes)


def tokens(mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Of everything that is [B, T, ...], in an operation on ``mesh``."""
    return PartitionSpec(batch_axes(mesh), "context")


def make_mesh(cfg: MeshConfig, devices: Sequence[Any]) -> Mesh:
    """``devices`` in the shape of ``cfg``: the axes laid on the slice's torus, several slices along ``data``."""
    n, sizes = len(devices), dataclasses.asdict(cfg)
    rest = math.prod(size for name, size in sizes.items() if name != "data")
    sizes["data"] = sizes["data"] or n // rest
    if math.prod(sizes.values()) != n:
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "data 1"
        raise UserError(
            f"the mesh {asked} does not have the {n} devices that there are: change mesh.fsdp, mesh.expert, ..."
        )
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = tuple(sizes.values())
    if slices == 1:
        arranged = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    elif sizes["data"] % slices:
        raise UserError(f"mesh.data = {sizes['data']} does not divide over {slices} slices")
    else:
        inner = (sizes["data"] // slices, *shape[1:])
        arranged = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * len(AXES))
