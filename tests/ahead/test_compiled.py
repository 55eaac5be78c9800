"""Programs that libtpu compiles for slices that are not there, whose FLOPs and collectives are known beforehand."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kimi_jax.ahead.collectives import BETWEEN_SLICES, collectives
from kimi_jax.ahead.memory import saved
from kimi_jax.ahead.program import Program
from kimi_jax.ahead.roofline import traffic, work_of
from kimi_jax.ahead.topology import extent, slice_of, topology_devices
from kimi_jax.errors import UserError
from kimi_jax.sharding.mesh import MeshConfig, make_mesh

TRIPS = 6


@pytest.fixture(autouse=True)
def no_cache():
    """What the cache keeps of a topology cannot be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def compiled(f, mesh: Mesh, *given: tuple[tuple[int, ...], P]) -> Program:
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for shape, spec in given]
    return Program.from_text(jax.jit(f).lower(*shapes).compile().as_text())


def test_a_gather_in_a_scan():
    """Each of 6 trips gathers [512, 1024] bf16 over the 4 devices of one axis and multiplies with it."""
    mesh = make_mesh(MeshConfig(fsdp=4, expert=2), topology_devices("v5p:2x2x2"))

    @partial(jax.shard_map, mesh=mesh, in_specs=(P(None, "fsdp"), P("expert")), out_specs=P("expert"), check_vma=False)
    def f(w_LXY, x_MX):
        def layer(x_MX, w_XY):
            return jnp.tanh(x_MX @ lax.all_gather(w_XY, "fsdp", tiled=True)), None

        return lax.scan(layer, x_MX, w_LXY)[0]

    program = compiled(f, mesh, ((TRIPS, 1024, 1024), P(None, "fsdp")), ((512, 1024), P("expert")))
    found = list(collectives(program, dict(mesh.shape)))
    assert {(c.kind, c.axes) for c in found} == {("all-gather", ("fsdp",))}
    assert sum(c.bytes for c in found) == TRIPS * 1024 * 1024 * 2 * 3 / 4
    assert sum(c.runs for c in found) == TRIPS
    done = work_of(program, "TPU v5")
    assert done.flops == TRIPS * 2 * 256 * 1024 * 1024
    assert done.hbm_bytes < 4 * TRIPS * 1024 * 1024 * 2  # whole stacks, counted at every trip, would be more
    (row,) = traffic(found, list(mesh.devices.flat))
    assert row.seconds > 0


def test_what_a_scan_keeps_for_the_backward_pass():
    """The input of each of 6 layers, recomputing the rest: [6, 128, 512] bf16."""
    mesh = make_mesh(MeshConfig(), topology_devices("v5p:2x2x1")[:1])

    def loss(w_LXX, x_MX):
        layer = jax.checkpoint(lambda x_MX, w_XX: (jnp.tanh(x_MX @ w_XX) @ w_XX, None), prevent_cse=False)
        return jnp.sum(lax.scan(layer, x_MX, w_LXX)[0].astype(jnp.float32))

    program = compiled(jax.grad(loss), mesh, ((TRIPS, 512, 512), P()), ((128, 512), P()))
    assert saved(program) == TRIPS * 128 * 512 * 2
    by_scope = work_of(program, "TPU v5").product_flops
    product = 2 * 128 * 512 * 512
    assert by_scope["forward"] == TRIPS * 2 * product
    assert by_scope["recomputed"] + by_scope["backward"] in (TRIPS * 5 * product, TRIPS * 6 * product)


def test_a_sum_between_slices():
    """Gradients of replicas in two slices of v6e: reduced by the network, and along no axis of the torus but fsdp."""
    devices = topology_devices("v6e:2x2", slices=2)
    assert [slice_of(device) for device in devices] == [0] * 4 + [1] * 4 and extent(devices) == (2, 2, 1)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4), devices)

    def gradient(w_XY, x_MX):
        return jax.grad(lambda w_XY: jnp.sum((x_MX @ w_XY).astype(jnp.float32) ** 2))(w_XY)

    f = jax.jit(gradient, out_shardings=NamedSharding(mesh, P("fsdp")))
    program = compiled(f, mesh, ((1024, 2048), P("fsdp")), ((4096, 1024), P(("data", "fsdp"))))
    found = list(collectives(program, dict(mesh.shape), slices=2))
    across = [c for c in found if c.axes == (BETWEEN_SLICES,)]
    assert across and all(c.axes in ((BETWEEN_SLICES,), ("fsdp",)) for c in found)
    part = 1024 * 2048 / 4
    assert sum(c.bytes for c in across) in (part * 2, part * 4)  # bf16 or f32, 2 (2 - 1) / 2 of it
    (row,) = (row for row in traffic(found, list(mesh.devices.flat)) if row.axes == BETWEEN_SLICES)
    assert row.seconds == pytest.approx(row.bytes / 12.5e9)


@pytest.mark.parametrize("name, slices, says", [("v9:3x3", 1, "no topology of libtpu"), ("v5p:2x2x1", 0, "at least 1")])
def test_bad_topologies(name, slices, says):
    with pytest.raises(UserError, match=says):
        topology_devices(name, slices)
