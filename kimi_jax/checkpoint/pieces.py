"""The pieces of a sharded tree: every part of a leaf that some device holds, under a name that says all about it.

    params.moe_layers.moe.experts.gate float32 [0:2/2,4:8/8,0:16/16,0:16/16]    first:last/size, axis by axis

Who holds a piece follows from the shardings alone, so all processes know it of each other. A piece that one process
alone holds is mirrored: the next lower process keeps a copy of it, so that the loss of a host loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kimi_jax.checkpoint.manager import leaf_name, leaves


@cache
def _places(leaf: str, dtype: np.dtype, shape: tuple[int, ...], sharding: NamedSharding) -> dict[Any, str]:
    """Device -> the piece of this leaf that it holds."""
    found = {}
    for device, index in sharding.devices_indices_map(shape).items():
        spans = (f"{s.indices(n)[0]}:{s.indices(n)[1]}/{n}" for s, n in zip(index, shape, strict=True))
        found[device] = f"{leaf} {dtype} [{','.join(spans)}]"
    return found


def leaf_of(piece: str) -> str:
    """Name and dtype of the leaf that a piece belongs to."""
    return piece.rpartition(" ")[0]


def by_process(like: Any) -> dict[int, set[str]]:
    """Process -> the pieces that its devices hold, of a tree of arrays or of shapes with shardings."""
    found: dict[int, set[str]] = {}
    for leaf, x in leaves(like).items():
        for device, piece in _places(leaf, np.dtype(x.dtype), x.shape, x.sharding).items():
            found.setdefault(device.process_index, set()).add(piece)
    return found


def assembled(like: Any, pieces: Mapping[str, np.ndarray]) -> Any:
    """Arrays in the shapes and shardings of ``like`` from the pieces of this process's devices, which are copied."""

    def array(path: Any, x: Any) -> jax.Array:
        places = _places(leaf_name(path), np.dtype(x.dtype), x.shape, x.sharding)
        mine = [(device, piece) for device, piece in places.items() if device.process_index == jax.process_index()]
        shards = [jax.device_put(np.array(pieces[piece]), device) for device, piece in mine]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)

    return jax.tree_util.tree_map_with_path(array, like)


def on_host(tree: Any) -> dict[str, np.ndarray]:
    """Copies, in the host's memory, of all pieces that this process's devices hold, and of those that it mirrors.

    All processes have to call it together. The mirror of one leaf at a time lies on the devices.
    """
    arrays = {leaf: (x, _places(leaf, np.dtype(x.dtype), x.shape, x.sharding)) for leaf, x in leaves(tree).items()}
    held: dict[str, jax.Array] = {}
    for x, places in arrays.values():
        held |= _shards(x, places)
    for shard in held.values():
        shard.copy_to_host_async()
    found = {piece: _copied(shard) for piece, shard in held.items()}
    for x, places in arrays.values():
        if _any_held_once(places):
            source = _sources(x.sharding.mesh)
            mirror = _mirrored(x, x.sharding.mesh, x.sharding.spec)
            mirrors = _shards(mirror, {device: places[source[device]] for device in places})
            for shard in mirrors.values():
                shard.copy_to_host_async()
            found |= {piece: _copied(shard).view(x.dtype) for piece, shard in mirrors.items() if piece not in found}
            mirror.delete()
    return found


def _shards(x: jax.Array, places: Mapping[Any, str]) -> dict[str, jax.Array]:
    """The data of each piece that is here, of one of the devices that hold it."""
    return {places[shard.device]: shard.data for shard in x.addressable_shards}


def _copied(shard: jax.Array) -> np.ndarray:
    """Memory of the host's own: a CPU device lends its buffer, which the next step will write to."""
    data = np.asarray(shard)
    return data.copy() if jax.default_backend() == "cpu" else data


def _any_held_once(places: Mapping[Any, str]) -> bool:
    processes: dict[str, set[int]] = {}
    for device, piece in places.items():
        processes.setdefault(piece, set()).add(device.process_index)
    several = len(set().union(*processes.values())) > 1
    return several and any(len(holders) == 1 for holders in processes.values())


@cache
def _sources(mesh: Mesh) -> dict[Any, Any]:
    """Device -> the device whose piece it mirrors: the one in the same place of the next process."""
    by_process: dict[int, list[Any]] = {}
    for device in sorted(mesh.devices.flat, key=lambda device: device.id):
        by_process.setdefault(device.process_index, []).append(device)
    hosts = [by_process[process] for process in sorted(by_process)]
    return {mine: next_ for here, there in zip(hosts, hosts[1:] + hosts[:1], strict=True)
            for mine, next_ in zip(here, there, strict=True)}  # fmt: skip


def _mirrored(x: jax.Array, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Every device's shard moved to the device that mirrors it, as integers: floats would lose the bits of a NaN."""
    order = {device: i for i, device in enumerate(mesh.devices.flat)}
    moves = tuple((order[source], order[mirror]) for mirror, source in _sources(mesh).items())
    return _moved(x, mesh, spec, moves)


@partial(jax.jit, static_argnums=(1, 2, 3))
def _moved(x: jax.Array, mesh: Mesh, spec: PartitionSpec, moves: tuple[tuple[int, int], ...]) -> jax.Array:
    def local(shard: jax.Array) -> jax.Array:
        if jnp.issubdtype(shard.dtype, jnp.floating):
            shard = lax.bitcast_convert_type(shard, jnp.dtype(f"uint{8 * shard.dtype.itemsize}"))
        return lax.ppermute(shard, mesh.axis_names, moves)

    return jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(x)
