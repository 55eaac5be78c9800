"""Sums over processes that ride along with the steps, so that all know the same at the same step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Total:
    """``total(values)``: the sum of small vectors over all processes, as an array that is read when it is wanted.

    Every process has to call it equally often. On a single process it is the vector itself.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._sum = jax.jit(lambda parts: jnp.sum(parts, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, *values: float) -> np.ndarray | jax.Array:
        if jax.process_count() == 1:
            return np.array(values)
        n = self._mesh.size
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        first, *others = sharding.addressable_devices_indices_map((n,))
        mine, nothing = np.array([values], np.float32), np.zeros((1, len(values)), np.float32)
        parts = [jax.device_put(mine, first), *(jax.device_put(nothing, device) for device in others)]
        return self._sum(jax.make_array_from_single_device_arrays((n, len(values)), sharding, parts))
