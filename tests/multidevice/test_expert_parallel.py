"""Experts spread over devices against the loop on one, whatever the routing and the way rows travel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from kimi_jax import presets
from kimi_jax.dims import is_spec
from kimi_jax.layers import experts
from kimi_jax.sharding import exchange
from kimi_jax.sharding import expert_parallel as expert_parallel_module
from kimi_jax.sharding.expert_parallel import expert_parallel
from kimi_jax.sharding.fp8_rows import compressed, restored
from kimi_jax.sharding.mesh import AXES

B, T, D, F, E, K = 8, 6, 8, 4, 16, 3
MESHES = {
    "expert 8": (1, 1, 8, 1, 1),
    "fsdp 2, expert 4": (1, 2, 4, 1, 1),
    "expert 2, tensor 2, context 2": (1, 1, 2, 2, 2),
}
MESHES |= {"data 2, expert 2, fsdp 2": (2, 2, 2, 1, 1), "data 8": (8, 1, 1, 1, 1)}
MESHES |= {"fsdp 2, expert 2, tensor 2": (1, 2, 2, 2, 1)}
CFG = presets.tiny().replace(
    n_routed_experts=E, num_experts_per_tok=K, hidden_size=D, moe_intermediate_size=F, experts="looped"
)


def routing(name: str, T: int = T) -> np.ndarray:
    rng = np.random.default_rng(0)
    if name == "random":
        return np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
    if name == "balanced":
        return np.arange(B * T * K).reshape(B, T, K) % E
    return np.broadcast_to([E - 1, E - 2, 0], (B, T, K))  # two experts, of one device if it has two or more, take all


def ragged_all_to_all(rows, into, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What XLA:CPU lacks, by sending everything to everybody; what does not fit together shows as NaN."""
    here, n = lax.axis_index(axis_name), lax.axis_size(axis_name)
    rows_I, starts_IJ, sizes_IJ, places_IJ = (
        lax.all_gather(a, axis_name) for a in (rows, input_offsets, send_sizes, output_offsets)
    )
    into = jnp.where((sizes_IJ[:, here] == recv_sizes).all(), into, jnp.asarray(jnp.nan).astype(into.dtype))
    k = jnp.arange(rows.shape[0])
    for i in range(n):
        start, size, place = (a[i, here] for a in (starts_IJ, sizes_IJ, places_IJ))
        at = jnp.where(k < size, place + k, len(into))
        into = into.at[at].set(rows_I[i].at[start + k].get(mode="clip"), mode="drop")
    return into


@pytest.fixture
def on_cpu(monkeypatch):
    """A ragged exchange for XLA:CPU, and buffers whose content matters to nobody full of NaN."""
    monkeypatch.setattr(lax, "ragged_all_to_all", ragged_all_to_all)
    monkeypatch.setattr(lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, jnp.float32).astype(dtype))


def spread_and_looped(mesh_name: str, way: str, n_shared: int = 1, T: int = T, **options):
    """experts -> value and gradients, twice: of experts spread over a mesh, and of the loop."""
    mesh, cfg = mesh_of(mesh_name), CFG.replace(n_shared_experts=n_shared)
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    p = jax.tree.map(lambda spec: draw(*spec.shape), experts.specs(cfg), is_leaf=is_spec)
    x_BTD, weights_BTK, dy_BTD = draw(B, T, D), jnp.abs(draw(B, T, K)), draw(B, T, D)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(run, experts_BTK):
        y, pullback = jax.vjp(lambda p, x, w: run(p, cfg, x, w, experts_BTK), p, x_BTD, weights_BTK)
        return y, *pullback(dy_BTD)

    spread = expert_parallel(mesh, way, **options)
    return lambda chosen: [jax.device_get(value_and_gradients(run, chosen)) for run in (spread, experts.run)]


def mesh_of(name: str) -> Mesh:
    return Mesh(np.asarray(jax.devices()).reshape(MESHES[name]), AXES, axis_types=(AxisType.Auto,) * 5)


def farthest(ours, theirs) -> float:
    """The largest relative distance of all results and gradients."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs)


QUICK = [(name, way) for name in MESHES for way in ("padded", "ring", "ragged") if name != "data 8" or way == "ragged"]
SLOW = [pytest.param("data 8", way, marks=pytest.mark.slow) for way in ("padded", "ring")]  # nobody to send to


@pytest.mark.parametrize("mesh_name, way", QUICK + SLOW)
def test_spread_experts_are_the_loop_on_one_device(mesh_name, way, on_cpu):
    both = spread_and_looped(mesh_name, way)
    for name in ("random", "balanced", "two take all"):
        assert farthest(*both(jnp.asarray(routing(name), jnp.int32))) <= 2e-6, name


@pytest.mark.parametrize("at_once, way, T", [(4, "ragged", 6), (6, "padded", 6), (3, "ragged", 6), (5, "padded", 7)])
def test_tokens_in_chunks(at_once, way, T, on_cpu, monkeypatch):
    """A device has twelve: three chunks, a pair, and two pairs; or fourteen, in three of five."""
    monkeypatch.setattr(expert_parallel_module, "TOKENS_AT_ONCE", at_once)
    both = spread_and_looped("fsdp 2, expert 2, tensor 2", way, T=T)
    for name in ("random", "two take all"):
        assert farthest(*both(jnp.asarray(routing(name, T), jnp.int32))) <= 2e-6, name


@pytest.mark.parametrize(
    "M, chunks", [(8192, (1, 8192)), (20_480, (4, 5120)), (10_007, (2, 5004)), (16_411, (3, 5471))]
)
def test_chunks_of_any_number_of_tokens(M, chunks):
    assert expert_parallel_module._chunks(jnp.zeros((M, 1)))[0].shape == (*chunks, 1)


@pytest.mark.parametrize("n_shared", [0, 2])
def test_no_shared_expert_or_several(n_shared, on_cpu):
    both = spread_and_looped("fsdp 2, expert 2, tensor 2", "padded", n_shared)
    assert farthest(*both(jnp.asarray(routing("random"), jnp.int32))) <= 2e-6


@pytest.mark.parametrize("way", ["padded", "ragged"])
def test_in_eight_bits_only_what_travels_to_the_experts_is_rounded(way, on_cpu):
    """3 bits of mantissa: each number is at most 1/16 off, and on average the sums of many less."""
    both = spread_and_looped("expert 8", way, fp8=True)
    assert 1e-3 < farthest(*both(jnp.asarray(routing("random"), jnp.int32))) < 0.08


@pytest.mark.parametrize("D", [256, 40])
def test_rows_in_eight_bits(D):
    x_AD = np.random.default_rng(0).standard_normal((5, D)).astype(np.float32) * 10.0 ** np.arange(-6, 4, 2)[:, None]
    x_AD[2] = 0
    rows = compressed(jnp.asarray(x_AD))
    assert rows.scale_At.shape == (5, 2 if D == 256 else 1)
    back = np.asarray(restored(rows, jnp.float32))
    largest = np.abs(x_AD.reshape(5, -1, 128 if D == 256 else D)).max(axis=2, keepdims=True)
    error = np.abs(back - x_AD).reshape(*largest.shape[:2], -1)
    assert (error <= np.maximum(np.abs(x_AD).reshape(error.shape) / 16, largest * 2.0**-17)).all()


@pytest.mark.parametrize("way", exchange.WAYS)
@pytest.mark.parametrize("balance", ["random", "one takes all"])
def test_every_row_travels_once_and_returns_to_its_place(way, balance, on_cpu):
    """Whatever the buffer: rows arrive with their experts, in as many rounds as said, and come back where they were."""
    mesh, A, rng = mesh_of("expert 8"), 12, np.random.default_rng(2)
    experts = np.sort(rng.integers(0, E, (8, A)) if balance == "random" else np.full((8, A), 5), axis=1)

    def travel(R, experts_1A):
        own_A = experts_1A[0]
        counts = exchange.counts(jnp.zeros(E, jnp.int32).at[own_A].add(1))
        n_rounds = exchange.WAYS[way].rounds(counts, R)
        ids_A1 = (lax.axis_index("expert") * A + jnp.arange(A) + 1.0)[:, None]

        def one(r, carry):
            back_A1, seen_X, wrong = carry
            journey = exchange.WAYS[way].begin(counts, R, r)
            arrived_R = journey.there(jnp.concatenate([ids_A1, own_A[:, None]], axis=1))
            real_R = journey.experts_R < E // 8
            expected_R = lax.axis_index("expert") * (E // 8) + journey.experts_R
            wrong += jnp.sum(real_R & (arrived_R[:, 1] != expected_R))
            at = jnp.where(real_R, arrived_R[:, 0].astype(jnp.int32), 8 * A + 1)
            return journey.back(2 * arrived_R[:, :1], back_A1), seen_X.at[at].add(1, mode="drop"), wrong

        start = (jnp.zeros((A, 1)), jnp.zeros(8 * A + 1, jnp.int32), jnp.zeros((), jnp.int32))
        back_A1, seen_X, wrong = lax.fori_loop(0, n_rounds, one, start)
        return back_A1[:, 0] / ids_A1[:, 0], lax.psum(seen_X, "expert"), lax.psum(wrong, "expert"), n_rounds

    for R in (8, 16, 96):
        spread = jax.shard_map(
            partial(travel, R), mesh=mesh, in_specs=PartitionSpec("expert"),
            out_specs=(PartitionSpec("expert"), *(PartitionSpec(),) * 3), check_vma=False,
        )  # fmt: skip
        doubled, seen, wrong, n_rounds = jax.jit(spread)(jnp.asarray(experts, jnp.int32))
        assert (doubled == 2).all() and (seen[1:] == 1).all() and wrong == 0
        busiest = max((experts // (E // 8) == j).sum() for j in range(8))
        assert way != "ragged" or n_rounds == -(-busiest // R)
