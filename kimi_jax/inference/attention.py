"""Latent attention of new tokens over the pages of their rows, by blocks of pages.

    o_t = sum_{s <= t} softmax_s(scale * q_t . k_s) v_s        t, s: positions in the row

Blocks are joined by the online softmax (FlashAttention-2, arXiv 2307.08691), so that [heads, T, S] is never whole and
the walk ends with the longest row's last page, however wide the page tables are. Both forms of MLA are one walk:

    absorbed   one key head for all: keys are [latent | rotary key] as cached, values the latents
    naive      keys and values are expanded from a block's latents for every head

On TPU, a few tokens per row go through ``kernels.paged_mla``, the absorbed form that reads no page twice.

The naive form takes fewer operations when many queries share the expansion: per head and cached token
T (H + R + W) + C (H + W) against T (2C + R). A row's result does not depend on the other rows: what they add to the
walk is masked, and adds exact zeros. Slots past a row's last position are read as zeros, for they may hold anything of
others, and 0 * NaN is NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.inference import cache
from kimi_jax.inference.ops import ON_ONE_DEVICE, Ops
from kimi_jax.kernels.paged_mla import paged_mla
from kimi_jax.layers.attention import MASKED
from kimi_jax.layers.linear import contract, product

BLOCK = 512  # positions of a block; a page if that is more, all pages if they are fewer
WALK = "walk"  # the scope of the loop over blocks, whose length the data decide
FEW = 8  # tokens per row that the kernel takes
LARGEST = 2**22  # logits of a block: 16 MiB, which stays on the chip; more heads or queries walk group after group


def prefers_naive(cfg: ModelConfig, T: int) -> bool:
    """Whether T queries over a long past take fewer operations in the naive form."""
    C, HW = cfg.kv_lora_rank, cfg.qk_nope_head_dim + cfg.v_head_dim
    return T * (2 * C - HW) > C * HW


def attend(
    p: Params, cfg: ModelConfig, q: tuple[Array, Array], cache_LPGX: Array, layer: Array, pages_BP: Array,
    pos_BT: Array, ops: Ops = ON_ONE_DEVICE,
) -> Array:  # fmt: skip
    """y [B, T, D] of queries at positions ``pos``, whose own tokens are in the cache already.

    On a mesh, ``q`` has some heads of all rows, pages and positions are those of a device's own rows, and the sum of
    all devices' y is the result.
    """
    form = naive if prefers_naive(cfg, pos_BT.shape[1]) else absorbed
    return form(p, cfg, q, cache_LPGX, layer, pages_BP, pos_BT, ops)


def absorbed(
    p: Params, cfg: ModelConfig, q: tuple[Array, Array], cache_LPGX: Array, layer: Array, pages_BP: Array,
    pos_BT: Array, ops: Ops = ON_ONE_DEVICE,
) -> Array:  # fmt: skip
    C, (L, P, G, X) = cfg.kv_lora_rank, cache_LPGX.shape
    w_k_CNH, w_v_CNW = jnp.split(p["kv_b"].astype(q[0].dtype), [cfg.qk_nope_head_dim], axis=-1)
    q_BTNX = jnp.concatenate([contract("BTNH,CNH->BTNC", q[0], w_k_CNH), q[1]], axis=-1)
    q_BTNX = cache.padded(ops.to_rows(q_BTNX), X)
    B, T, N, _ = q_BTNX.shape

    def walked(q_BZX: Array, cache_LPGX: Array, layer: Array, pages_BP: Array, pos_BT: Array) -> Array:
        def latents(kv_BSX: Array) -> tuple[Array, Array]:
            return kv_BSX[:, None], kv_BSX[:, None, :, :C]

        pos_BZ = jnp.repeat(pos_BT, N, axis=1)
        return _walk(latents, C, cfg.softmax_scale, q_BZX[:, None], pos_BZ, cache_LPGX, layer, pages_BP)[:, 0]

    def in_one_kernel(q_BZX: Array, cache_LPGX: Array, layer: Array, pages_BP: Array, pos_BT: Array) -> Array:
        pages = cache_LPGX.reshape(L * P, G, X), layer * P + pages_BP
        return paged_mla(q_BZX, *pages, pos_BT, C=C, scale=cfg.softmax_scale)

    args = q_BTNX.reshape(B, T * N, X), cache_LPGX, layer, pages_BP, pos_BT
    on_tpu = in_one_kernel if T <= FEW else walked
    mixed_BZC = lax.platform_dependent(*args, tpu=on_tpu, default=walked)
    o_BTNW = contract("BTNC,CNW->BTNW", ops.to_heads(mixed_BZC.reshape(B, T, N, C)), w_v_CNW)
    return contract("BTNW,NWD->BTD", o_BTNW, p["o"])


def naive(
    p: Params, cfg: ModelConfig, q: tuple[Array, Array], cache_LPGX: Array, layer: Array, pages_BP: Array,
    pos_BT: Array, ops: Ops = ON_ONE_DEVICE,
) -> Array:  # fmt: skip
    C, R = cfg.kv_lora_rank, cfg.qk_rope_head_dim
    q_BTNX, w_CNX = ops.to_rows(jnp.concatenate(q, axis=-1)), ops.all_heads(p["kv_b"]).astype(q[0].dtype)
    B, T, N, _ = q_BTNX.shape

    def heads(group: tuple[Array, Array]) -> Array:
        q_NBTX, w_NCX = group

        def expanded(kv_BSX: Array) -> tuple[Array, Array]:
            c_BSC, k_rope_BSR = kv_BSX[..., :C], kv_BSX[..., C : C + R]
            kv_BNSX = contract("BSC,NCX->BSNX", c_BSC, w_NCX).swapaxes(1, 2)
            k_nope_BNSH, v_BNSW = jnp.split(kv_BNSX, [cfg.qk_nope_head_dim], axis=-1)
            k_rope_BNSR = jnp.broadcast_to(k_rope_BSR[:, None], (*k_nope_BNSH.shape[:3], R))
            return jnp.concatenate([k_nope_BNSH, k_rope_BNSR], axis=-1), v_BNSW

        q_BNTX = q_NBTX.swapaxes(0, 1)
        o_BNTW = _walk(expanded, cfg.v_head_dim, cfg.softmax_scale, q_BNTX, pos_BT, cache_LPGX, layer, pages_BP)
        return o_BNTW.swapaxes(0, 1)

    q_NBTX = jnp.moveaxis(q_BTNX, 2, 0)
    S = _pages_of_a_block(cache_LPGX, pages_BP) * cache_LPGX.shape[2]
    o_NBTW = _in_groups(heads, N, B * T * S, q_NBTX, w_CNX.swapaxes(0, 1))
    return contract("BTNW,NWD->BTD", ops.to_heads(jnp.moveaxis(o_NBTW, 0, 2)), p["o"])


def _pages_of_a_block(cache_LPGX: Array, pages_BP: Array) -> int:
    return min(max(BLOCK // cache_LPGX.shape[2], 1), pages_BP.shape[1])


def _in_groups(f: Callable, n: int, logits_of_one: int, *args: Array) -> Array:
    """f of arrays whose leading axis has n entries, as many at a time as ``LARGEST`` allows."""
    g = next(g for g in range(1, n + 1) if n % g == 0 and (n // g * logits_of_one <= LARGEST or g == n))
    if g == 1:
        return f(args)
    split = tuple(a.reshape(g, n // g, *a.shape[1:]) for a in args)
    out = lax.map(f, split)
    return out.reshape(n, *out.shape[2:])


def _walk(
    keys_and_values: Callable, W: int, scale: float, q_BKZX: Array, pos_BZ: Array, cache_LPGX: Array, layer, pages_BP
) -> Array:
    """o [B, K, Z, W] of Z queries on each of K key heads, where a block's latents give keys [B, K, S, X] and values."""
    B, K, Z, X = q_BKZX.shape
    per_block = _pages_of_a_block(cache_LPGX, pages_BP)
    S = per_block * cache_LPGX.shape[2]
    pages_BP = jnp.pad(pages_BP, ((0, 0), (0, -pages_BP.shape[1] % per_block)))

    def queries(group: tuple[Array, Array]) -> Array:
        q_BKZX, pos_BZ = jnp.moveaxis(group[0], 0, 2), group[1].swapaxes(0, 1)
        last_B11 = jnp.max(pos_BZ, axis=1)[:, None, None]

        def block(i: Array, carry):
            max_BKZ1, total_BKZ1, o_BKZW = carry
            block_BP = lax.dynamic_slice_in_dim(pages_BP, i * per_block, per_block, axis=1)
            kv_BSX = cache.gather(cache_LPGX, layer, block_BP).astype(q_BKZX.dtype)
            pos_S = i * S + jnp.arange(S)
            k_BKSX, v_BKSW = keys_and_values(jnp.where(pos_S[:, None] <= last_B11, kv_BSX, 0))
            allowed_B1ZS = (pos_S <= pos_BZ[..., None])[:, None]
            logits_BKZS = scale * product("BKZX,BKSX->BKZS", q_BKZX, k_BKSX)
            new_max_BKZ1 = jnp.maximum(
                max_BKZ1, jnp.max(logits_BKZS, axis=-1, keepdims=True, where=allowed_B1ZS, initial=MASKED)
            )
            weights_BKZS = jnp.where(allowed_B1ZS, jnp.exp(logits_BKZS - new_max_BKZ1), 0)
            decay_BKZ1 = jnp.exp(max_BKZ1 - new_max_BKZ1)
            total_BKZ1 = decay_BKZ1 * total_BKZ1 + jnp.sum(weights_BKZS, axis=-1, keepdims=True)
            o_BKZW = decay_BKZ1 * o_BKZW + product("BKZS,BKSW->BKZW", weights_BKZS.astype(v_BKSW.dtype), v_BKSW)
            return new_max_BKZ1, total_BKZ1, o_BKZW

        shape = q_BKZX.shape[:3]
        nothing = jnp.full((*shape, 1), MASKED), jnp.zeros((*shape, 1)), jnp.zeros((*shape, W))
        n_blocks = jnp.max(pos_BZ) // S + 1
        with jax.named_scope(WALK):
            _, total_BKZ1, o_BKZW = lax.fori_loop(0, n_blocks, block, nothing)
        return jnp.moveaxis((o_BKZW / total_BKZ1).astype(q_BKZX.dtype), 2, 0)

    o_ZBKW = _in_groups(queries, Z, B * K * S, jnp.moveaxis(q_BKZX, 2, 0), pos_BZ.swapaxes(0, 1))
    return jnp.moveaxis(o_ZBKW, 0, 2)
