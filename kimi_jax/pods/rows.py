"""The rows of a global batch that this process's devices hold, loaded here and placed there."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


class Rows:
    """The rows of an array [B, T] that lies as ``sharding`` says, whatever the mesh and the order of its devices.

    Several processes hold the same rows where the mesh splits or repeats the other axes: each loads them.
    ``loaded``: the rows that this process needs, ascending. ``owned``: which of those no process before it needs, so
    that sums over all processes count every row once.
    """

    def __init__(self, sharding: Sharding, shape: tuple[int, int]):
        self._sharding, self._shape = sharding, shape
        held: dict[int, set[int]] = {}
        for device, index in sharding.devices_indices_map(shape).items():
            held.setdefault(device.process_index, set()).update(range(*index[0].indices(shape[0])))
        here = jax.process_index()
        before = set().union(*(rows for process, rows in held.items() if process < here))
        self.loaded = sorted(held[here])
        self.owned = np.array([row not in before for row in self.loaded])

    def place(self, local: np.ndarray) -> jax.Array:
        """The global array whose rows ``loaded`` are ``local``."""

        def shard(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(self._shape[0])
            start = self._position(first)
            return local[start : start + last - first, index[1]]

        return jax.make_array_from_callback(self._shape, self._sharding, shard)

    def _position(self, row: int) -> int:
        return int(np.searchsorted(self.loaded, row))
