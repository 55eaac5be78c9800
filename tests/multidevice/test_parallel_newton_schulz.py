"""Newton-Schulz spread over a mesh against float64, whatever the number and the shape of the matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kimi_jax.sharding.mesh import AXES
from kimi_jax.sharding.parallel_newton_schulz import deal, parallel_newton_schulz
from tests.optim.reference import newton_schulz as exact


def mesh_of(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)


@pytest.mark.parametrize(
    ("stack", "n", "m", "where"),
    [
        ((3, 8), 8, 12, (None, "expert", "fsdp")),
        ((5,), 12, 8, (None, "fsdp")),
        ((), 8, 24, ("fsdp",)),
        ((3,), 7, 9, ()),
    ],
)
def test_equals_the_reference(stack, n, m, where):
    mesh = mesh_of(1, 2, 4, 1, 1)
    x = np.random.default_rng(0).standard_normal((*stack, n, m)).astype(np.float32)
    expected = np.stack([exact(one) for one in x.reshape(-1, n, m)]).reshape(x.shape)
    placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*where)))
    found = jax.jit(lambda x: parallel_newton_schulz(mesh)(x, 5, jnp.float32))(placed)
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_matrices_are_dealt_out_whole_where_they_suffice():
    mesh = mesh_of(1, 2, 4, 1, 1)
    assert deal(48, 8, mesh) == (("expert", "fsdp"), ())
    assert deal(4, 8, mesh) == (("expert",), ("fsdp",))
    assert deal(1, 8, mesh) == ((), ("expert", "fsdp"))
    assert deal(3, 7, mesh) == (("expert", "fsdp"), ())  # 7 rows divide over nothing
