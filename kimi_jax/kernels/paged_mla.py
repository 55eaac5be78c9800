"""Absorbed latent attention of a few new tokens over a paged cache, as one TPU kernel.

    o_z = sum_{s <= pos_z} softmax_s(scale * q_z . k_s) k_s[:C]        z: the heads of a row's T new tokens

    q_BZX [rows, T * heads, C + R]    cache_PGX [pages, slots, C + R]    pages_BP page tables    pos_BT positions

A decoding step is bound by reading the latents, so each is read once for all heads and tokens of its row: the kernel
walks a row's pages by blocks, one block arriving from HBM while the last one is multiplied, the first block of the next
row while a row ends. Only pages that hold positions up to the row's last are read. ``paged_mla_plain`` is the same
without blocks.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kimi_jax.dims import Array

BLOCK = 512  # positions, or a page if that is more
MASKED = -1e30


def paged_mla_plain(q_BZX: Array, cache_PGX: Array, pages_BP: Array, pos_BT: Array, *, C: int, scale: float) -> Array:
    B, Z, X = q_BZX.shape
    kv_BSX = cache_PGX[pages_BP].reshape(B, -1, X).astype(jnp.float32)
    logits_BZS = scale * jnp.einsum("BZX,BSX->BZS", q_BZX.astype(jnp.float32), kv_BSX, precision="highest")
    pos_BZ1 = jnp.repeat(pos_BT, Z // pos_BT.shape[1], axis=1)[..., None]
    weights_BZS = jax.nn.softmax(jnp.where(jnp.arange(kv_BSX.shape[1]) <= pos_BZ1, logits_BZS, MASKED), axis=-1)
    return jnp.einsum("BZS,BSC->BZC", weights_BZS, kv_BSX[..., :C], precision="highest").astype(q_BZX.dtype)


def paged_mla(
    q_BZX: Array, cache_PGX: Array, pages_BP: Array, pos_BT: Array, *, C: int, scale: float, interpret: Any = False
) -> Array:
    """o [B, Z, C]. The positions of a row rise. Slots of a page: a multiple of 8 in f32, else of 16; X: of 128.

    Page tables and positions are held in SMEM, 4 bytes each: 1 MiB holds 30 rows of 131,072 tokens in pages of 16.
    """
    (B, Z, X), (_, G, _), T = q_BZX.shape, cache_PGX.shape, pos_BT.shape[1]
    halves = 2 if B % 2 == 0 else 1  # a chip with two cores takes one half of the rows on each
    row = lambda half, i, *_: (half * (B // halves) + i, 0, 0)  # noqa: E731
    per_block = min(max(BLOCK // G, 1), pages_BP.shape[1])
    positions = pages_BP.shape[1] * G  # of full page tables
    return pl.pallas_call(
        partial(_kernel, n_pages=pages_BP.shape[1], T=T, C=C, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(halves, B // halves),
            in_specs=[pl.BlockSpec((1, Z, X), row), pl.BlockSpec(memory_space=pl.ANY)],
            out_specs=pl.BlockSpec((1, Z, C), row),
            scratch_shapes=[
                pltpu.VMEM((2, per_block, G, X), cache_PGX.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, Z, C), q_BZX.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * B * Z * positions * (X + C),
            transcendentals=B * Z * positions,
            bytes_accessed=B * positions * X * cache_PGX.dtype.itemsize + B * Z * (X + C) * q_BZX.dtype.itemsize,
        ),
        interpret=interpret,
        name="paged_mla",
    )(pages_BP.reshape(-1), pos_BT.reshape(-1), q_BZX, cache_PGX)


def _kernel(pages, pos, q_1ZX, cache_PGX, o_1ZC, kv_2pGX, arrived_2, slot_1, *, n_pages: int, T: int, C: int, scale):
    """One row. ``pages`` [B * n_pages] and ``pos`` [B * T] hold all rows; ``slot``: where its first block arrives."""
    _, per_block, G, X = kv_2pGX.shape
    i, n_rows = pl.program_id(1), pl.num_programs(1)
    b = pl.program_id(0) * n_rows + i
    S, Z = per_block * G, q_1ZX.shape[1]

    def last(b: Array) -> Array:
        return pos[b * T + T - 1]

    def each_page(b: Array, block: Array | int, slot: Array | int, act) -> None:
        """``act`` on the transfer of every page of a row's block that holds a position up to the row's last."""
        first = block * per_block
        n = jnp.minimum(per_block, last(b) // G + 1 - first)

        def one(j: Array, _):
            page = pages[b * n_pages + first + j]
            act(pltpu.make_async_copy(cache_PGX.at[page], kv_2pGX.at[slot, j], arrived_2.at[slot]))
            return _

        lax.fori_loop(0, n, one, 0)

    def start(b: Array, block: Array | int, slot: Array | int) -> None:
        each_page(b, block, slot, lambda transfer: transfer.start())

    def clear(block: Array, slot: Array) -> None:
        """Zeros past the row's last position: what others left there may be NaN, which a weight of 0 does not hide."""
        after = last(b) + 1 - block * S

        def one(j: Array, _):
            held_GX = j * G + lax.broadcasted_iota(jnp.int32, (G, X), 0) < after
            kv_2pGX[slot, j] = jnp.where(held_GX, kv_2pGX[slot, j].astype(q_1ZX.dtype), 0).astype(kv_2pGX.dtype)
            return _

        lax.fori_loop(after // G, per_block, one, 0)

    @pl.when(i == 0)
    def _():
        slot_1[0] = 0
        start(b, 0, 0)

    first_slot, n_blocks = slot_1[0], last(b) // S + 1
    q_ZX = q_1ZX[0]
    pos_Z1 = jnp.concatenate([jnp.full((Z // T, 1), pos[b * T + t]) for t in range(T)])

    def step(block: Array, carry):
        max_Z1, total_Z1, o_ZC = carry
        slot = (first_slot + block) % 2
        row_ends = block + 1 == n_blocks
        then, at = jnp.where(row_ends, b + 1, b), jnp.where(row_ends, 0, block + 1)

        @pl.when(~row_ends | (i + 1 < n_rows))
        def _():
            start(then, at, 1 - slot)

        each_page(b, block, slot, lambda transfer: transfer.wait())
        pl.when(row_ends)(partial(clear, block, slot))
        kv_SX = kv_2pGX[slot].reshape(S, X).astype(q_ZX.dtype)
        logits_ZS = scale * _product(q_ZX, kv_SX, 1)
        allowed_ZS = block * S + lax.broadcasted_iota(jnp.int32, (Z, S), 1) <= pos_Z1
        logits_ZS = jnp.where(allowed_ZS, logits_ZS, MASKED)
        new_max_Z1 = jnp.maximum(max_Z1, jnp.max(logits_ZS, axis=1, keepdims=True))
        weights_ZS = jnp.exp(logits_ZS - new_max_Z1)
        decay_Z1 = jnp.exp(max_Z1 - new_max_Z1)
        total_Z1 = decay_Z1 * total_Z1 + jnp.sum(weights_ZS, axis=1, keepdims=True)
        return new_max_Z1, total_Z1, decay_Z1 * o_ZC + _product(weights_ZS.astype(kv_SX.dtype), kv_SX[:, :C], 0)

    nothing = jnp.full((Z, 1), MASKED, jnp.float32), jnp.zeros((Z, 1), jnp.float32), jnp.zeros((Z, C), jnp.float32)
    _, total_Z1, o_ZC = lax.fori_loop(0, n_blocks, step, nothing)
    slot_1[0] = (first_slot + n_blocks) % 2
    o_1ZC[0] = (o_ZC / total_Z1).astype(o_1ZC.dtype)


def _product(x: Array, y: Array, axis: int) -> Array:
    """x [Z, k] times y, over the axis of y named, accumulated in f32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, y, (((1,), (axis,)), ((), ())), precision, jnp.float32)
