"""Newton-Schulz spread over a mesh against float64, whatever the number and the shape of the matrices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from kimi_jax.dims import Fused, ParamSpec
from kimi_jax.optim.axes import layouts
from kimi_jax.sharding import parallel_newton_schulz
from kimi_jax.sharding.mesh import AXES
from kimi_jax.sharding.parallel_newton_schulz import Spread, deal, parallel_orthogonalised
from kimi_jax.sharding.rules import TRAIN, partition
from tests.optim.reference import newton_schulz as exact

RMS = 0.3
NOWHERE = Spread((), (), ())


def mesh_of(*shape: int) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)


def expected_of(x: np.ndarray, stack: int, n: int, m: int) -> np.ndarray:
    each = [RMS * max(n, m) ** 0.5 * exact(one) for one in x.reshape(-1, n, m)]
    return np.stack(each).reshape(x.shape)


LEAVES = {  # shape, axes, number of stack axes, rows, columns
    "experts, wide": ((3, 8, 16, 24), ("layers", "experts", "embed", "expert_mlp"), 16, 24),
    "experts, tall": ((3, 8, 24, 16), ("layers", "experts", "expert_mlp", "embed"), 24, 16),
    "fewer than devices": ((5, 32, 48), ("layers", "embed", "mlp"), 32, 48),
    "heads": ((3, 4, 6, 32), ("layers", "heads", "value", "embed"), 24, 32),
    "few rows on a device": ((1, 16, 4, 64), ("layers", "kv_lora", "heads", "value"), 16, 256),
    "one": ((1, 48, 16), ("layers", "mlp", "embed"), 48, 16),
    "rows that divide over nothing": ((3, 8, 7), ("layers", "embed", "router"), 8, 7),
}


@pytest.mark.parametrize("shape", [(1, 2, 4, 1, 1), (1, 1, 2, 2, 2), (2, 1, 4, 1, 1), (1, 8, 1, 1, 1)])
@pytest.mark.parametrize("name", LEAVES)
def test_equals_the_reference(name, shape):
    dims, axes, n, m = LEAVES[name]
    x = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    found = run(x, axes, mesh_of(*shape), split_fused=False)
    np.testing.assert_allclose(found, expected_of(x, 1, n, m), atol=1e-5)


def test_parts_of_a_fused_axis_are_matrices_of_their_own():
    axes = ("layers", "q_lora", "heads", Fused((("nope", 6), ("rope", 2))))
    x = np.random.default_rng(0).standard_normal((3, 16, 4, 8)).astype(np.float32)
    found = run(x, axes, mesh_of(1, 2, 2, 2, 1), split_fused=True)
    nope, rope = expected_of(x[..., :6], 1, 16, 24), expected_of(x[..., 6:], 1, 16, 8)
    np.testing.assert_allclose(found, np.concatenate([nope, rope], axis=-1), atol=1e-5)


def run(x: np.ndarray, axes, mesh: Mesh, split_fused: bool):
    spec = ParamSpec(x.shape, axes)
    (layout,) = layouts([jnp.asarray(x)], [axes], split_fused)
    placed = jax.device_put(x, NamedSharding(mesh, partition(spec, mesh, TRAIN)))
    return jax.jit(lambda x: parallel_orthogonalised(mesh)(x, layout, RMS, 5, jnp.float32))(placed)


def test_matrices_are_dealt_out_whole_where_they_suffice():
    mesh = mesh_of(1, 2, 4, 1, 1)
    assert deal(48, 64, 64, NOWHERE, mesh) == (("expert", "fsdp"), (), ())
    assert deal(6, 64, 64, Spread(("expert",), ("fsdp",), ()), mesh) == (("fsdp",), (), ())
    assert deal(3, 7, 9, NOWHERE, mesh) == (("expert", "fsdp"), (), ())  # 7 rows divide over nothing
    assert deal(1, 8, 8, NOWHERE, mesh) == (("expert", "fsdp"), (), ())  # so small that moving them takes longer


def test_the_few_and_large_lie_in_blocks():
    mesh = mesh_of(1, 2, 4, 1, 1)
    assert deal(4, 8192, 8192, NOWHERE, mesh) == (("expert",), ("fsdp",), ())
    assert deal(1, 2**15, 2**17, NOWHERE, mesh) == ((), ("expert",), ("fsdp",))


@pytest.mark.parametrize("shape", [(1, 2, 4, 1, 1), (1, 1, 2, 2, 2)])
@pytest.mark.parametrize("name", ["heads", "one", "experts, tall", "few rows on a device"])
@pytest.mark.parametrize("sides", [(0, 1, 2, 1), (1, 2, 0, 2), (2, 1, 1, 0)])
def test_every_way_to_deal_gives_the_same(name, shape, sides, monkeypatch):
    """Whatever ``deal`` decides: axes split the stack, the rows or the columns, wherever they split the leaf."""
    dims, axes, n, m = LEAVES[name]
    mesh = mesh_of(*shape)

    def deal(S, n, m, now, mesh):
        found = [[], [], []]
        for axis, side in zip(parallel_newton_schulz.AXES, sides, strict=True):
            if mesh.shape[axis] > 1 and axis not in now.stack:
                found[side].append(axis)
        return Spread(*map(tuple, found))

    monkeypatch.setattr(parallel_newton_schulz, "deal", deal)
    x = np.random.default_rng(0).standard_normal(dims).astype(np.float32)
    np.testing.assert_allclose(run(x, axes, mesh, False), expected_of(x, 1, n, m), atol=1e-5)
