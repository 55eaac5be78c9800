"""The grouped product of eight-bit weights, interpreted, against its plain twin and float64, with races looked for;
and compiled for the TPUs that serve the released model."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh, PartitionSpec

from kimi_jax.ahead.topology import topology_devices
from kimi_jax.kernels import grouped_quantized as kernel

RACES = pltpu.InterpretParams(detect_races=True)
CASES = {  # sizes of the groups, rows, X, Y, blocks
    "odd sizes": ([3, 17, 1, 20], 41, 256, 384, (128, 128)),
    "rows of no group": ([0, 5, 2], 12, 130, 256, (64, 64)),
    "empty groups, all rows in one": ([0, 0, 40, 0], 40, 128, 128, (128, 128)),
    "no rows": ([0, 0], 6, 24, 40, (8, 16)),
    "blocks that do not divide": ([5, 0, 6], 11, 136, 200, (128, 128)),
    "blocks of 64, wide": ([5, 6, 21], 32, 72, 384, (64, 64)),
    "a scale for every column": ([2, 0, 30], 40, 600, 256, (600, 1)),
}


def drawn(sizes, n_rows, X, Y, blocks, dtype, x_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    G = 2 * len(sizes)  # of two layers
    values = rng.integers(-127, 128, (G, X, Y)) if dtype == jnp.int8 else rng.standard_normal((G, X, Y))
    scale = rng.uniform(0.5, 2, (G, -(-X // blocks[0]), -(-Y // blocks[1])))
    x = rng.standard_normal((n_rows, X))
    return jnp.asarray(x, x_dtype), jnp.asarray(values, dtype), jnp.asarray(scale, jnp.float32)


def float64(x, values, scale, sizes, blocks):
    """One row at a time; zeros for rows of no group."""
    x, values, scale = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x, values, scale))
    y = np.zeros((len(x), values.shape[2]))
    for a, e in enumerate(np.repeat(np.arange(len(sizes)), sizes)):
        g = len(sizes) + e
        w = np.repeat(np.repeat(scale[g], blocks[0], 0), blocks[1], 1)[: values.shape[1], : values.shape[2]]
        y[a] = x[a] @ (values[g] * w)
    return y


def run(product, x, values, scale, sizes, **how):
    """The product of rows sorted by group of the second layer."""
    t = kernel.tiles(jnp.asarray(sizes, jnp.int32), len(x))
    at = jnp.zeros(t.n_slots, jnp.int32).at[t.slot_A].set(jnp.arange(len(x)), mode="drop")
    y = product(x[at], values, scale, t.group_I + len(sizes), t.count, **how)
    return y.at[t.slot_A].get(mode="fill", fill_value=0)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.int8])
@pytest.mark.parametrize("name", CASES)
def test_the_kernel_equals_float64_without_races(name, dtype, monkeypatch):
    monkeypatch.setattr(kernel, "TILE_BYTES", 2**15)  # several tiles of columns
    sizes, n_rows, X, Y, blocks = CASES[name]
    inputs = drawn(sizes, n_rows, X, Y, blocks, dtype)
    expected = float64(*inputs, sizes, blocks)
    close = {"rtol": 1e-4, "atol": 1e-5 * max(np.abs(expected).max(), 1)}
    np.testing.assert_allclose(run(kernel.grouped_plain, *inputs, sizes, blocks=blocks), expected, **close)
    np.testing.assert_allclose(
        run(kernel.grouped, *inputs, sizes, blocks=blocks, most=len(sizes), interpret=RACES), expected, **close
    )
    assert not races_found()


def test_in_bf16_values_are_exact_and_scales_f32():
    sizes, n_rows, X, Y, blocks = CASES["odd sizes"]
    inputs = drawn(sizes, n_rows, X, Y, blocks, jnp.int8, jnp.bfloat16)
    expected = float64(*inputs, sizes, blocks)
    found = run(kernel.grouped, *inputs, sizes, blocks=blocks, most=len(sizes), interpret=True)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=2**-8, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [[3, 17, 1, 20], [0, 0, 41, 0], [0] * 4, [0, 1, 0, 200], [40, 0, 0, 1], [1] * 40])
def test_every_row_has_a_slot_in_a_tile_of_its_group(sizes):
    n_rows = sum(sizes) + 3
    t = kernel.tiles(jnp.asarray(sizes, jnp.int32), n_rows)
    slots, groups = np.asarray(t.slot_A), np.repeat(np.arange(len(sizes)), sizes)
    assert len(set(slots[: len(groups)])) == len(groups)
    assert (slots[len(groups) :] == t.n_slots).all()
    np.testing.assert_array_equal(np.asarray(t.group_I)[slots[: len(groups)] // t.rows], groups)
    assert t.count == sum(-(-size // t.rows) for size in sizes) <= len(t.group_I)
    last = t.group_I[max(int(t.count) - 1, 0)]
    assert (np.asarray(t.group_I)[int(t.count) :] == last).all()  # so that no other matrix is read


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found


@pytest.fixture
def no_cache():
    """What the cache keeps of a topology cannot be read back."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)


@pytest.mark.parametrize("X, Y", [(7168, 2048), pytest.param(2048, 7168, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, pytest.param(jnp.int8, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "topology", ["v6e:2x2", *(pytest.param(t, marks=pytest.mark.slow) for t in ("v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"))]
)
def test_it_compiles_for_a_tpu(topology, dtype, X, Y, no_cache):
    """12 of 384 experts on a device, 1,024 assignments, 2 layers: weights and scales are read as they lie."""
    E, A, blocks = 12, 1024, (X, 1) if dtype == jnp.int8 else (128, 128)

    def product(x_RX, values_GXY, scale_Gxy, sizes_E):
        t = kernel.tiles(sizes_E, A)
        return kernel.grouped(x_RX, values_GXY, scale_Gxy, t.group_I + E, t.count, blocks=blocks, most=E)

    mesh = Mesh(np.array(topology_devices(topology)[:1]), ("expert",))
    whole = jax.NamedSharding(mesh, PartitionSpec())
    scale = (2 * E, -(-X // blocks[0]), -(-Y // blocks[1]))
    rows = kernel.tiles(jnp.zeros(E, jnp.int32), A).n_slots
    shapes = [((rows, X), jnp.bfloat16), ((2 * E, X, Y), dtype), (scale, jnp.float32), ((E,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(shape, dtype, sharding=whole) for shape, dtype in shapes]
    sharded = jax.shard_map(product, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    program = jax.jit(sharded).lower(*arguments).compile()
    assert program.memory_analysis().temp_size_in_bytes < 2**20
    assert "copy" not in "".join(line for line in program.as_text().splitlines() if f"[{2 * E}," in line.split("=")[0])
