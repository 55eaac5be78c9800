"""Pieces of arrays that eight devices hold, copied to the host before the buffers are given away, and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.checkpoint import pieces
from kimi_jax.checkpoint.emergency import LocalCopies, Save


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"), axis_types=(AxisType.Auto,) * 3)


def tree(mesh: Mesh) -> dict[str, Any]:
    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    bits = np.random.default_rng(0).integers(0, 2**32, (4, 8, 6), dtype=np.uint32)
    return {
        "all": put(bits.view(np.float32), "a", "b", "c"),
        "some": put((bits >> 16).astype(np.uint16)[..., 0].view(jnp.bfloat16), ("c", "a")),
        "none": put(bits[0].astype(np.int32)),
        "scalar": put(np.int32(3)),
    }


def bits(x: Any) -> tuple:
    return x.dtype, x.shape, np.asarray(x).tobytes()


def test_round_trip_over_eight_devices(mesh, tmp_path):
    state = tree(mesh)
    wanted = {name: bits(x) for name, x in state.items()}
    copies = LocalCopies(tmp_path, "a1", "b2", 0)
    copies.write(5, pieces.on_host(state))
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = pieces.assembled(like, copies.read(Save(5, "b2")))
    assert {name: bits(x) for name, x in found.items()} == wanted
    assert all(found[name].sharding == state[name].sharding for name in state)


def test_every_distinct_piece_is_copied_once(mesh):
    found = pieces.on_host(tree(mesh))
    count = {leaf: sum(piece.startswith(leaf) for piece in found) for leaf in ("all", "some", "none", "scalar")}
    assert count == {"all": 8, "some": 4, "none": 1, "scalar": 1}
    assert "some bfloat16 [1:2/4,0:8/8]" in found and "scalar int32 []" in found
    assert pieces.by_process(tree(mesh)) == {0: set(found)}


def test_the_copies_outlive_donated_buffers(mesh):
    x = jax.device_put(np.zeros((8, 1024), np.float32), NamedSharding(mesh, PartitionSpec("a")))
    found = pieces.on_host({"x": x})
    lent = [np.asarray(shard.data) for shard in x.addressable_shards]
    assert not any(np.shares_memory(a, b) for a in lent for b in found.values())
    del lent
    overwrite = jax.jit(lambda x: x + 1, donate_argnums=0)
    y = overwrite(overwrite(x))
    assert x.is_deleted() and float(y[0, 0]) == 2
    assert all(not piece.any() for piece in found.values())


class Device:
    def __init__(self, id: int, process_index: int):
        self.id, self.process_index = id, process_index


def test_a_mirror_is_on_another_process_and_every_piece_is_mirrored_once():
    """Devices that do not exist, in an order that is not that of the processes."""
    devices = np.array([Device(i, i // 2) for i in (4, 0, 3, 5, 1, 2)], object).reshape(3, 2)
    sources = pieces._sources.__wrapped__(type("Mesh", (), {"devices": devices}))
    assert {(mirror.id, source.id) for mirror, source in sources.items()} == {
        (0, 2), (1, 3), (2, 4), (3, 5), (4, 0), (5, 1)
    }  # fmt: skip
