"""Causal attention within segments, and the largest logit of every head.

    l_ij = scale * q_i . k_j    over allowed pairs: j <= i, same segment, segment not 0 (padding)
    o_i  = sum_j exp(l_ij - lse_i) v_j,    lse_i = log sum_j exp(l_ij)

``plain_attention`` writes this down. ``attention`` is the same computed by blocks of queries against the keys up to
their own end, in f32 between the products, keeping nothing quadratic for the backward pass (FlashAttention-2, arXiv
2307.08691). Its products are arranged so that only the small operands are ever transposed.

The maximum over allowed pairs is QK-Clip's signal (Kimi K2 report, section 2.1). It falls out of the softmax.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from kimi_jax.dims import Array
from kimi_jax.layers.linear import product, transposed

MASKED = -1e30  # finite, so that a query without any allowed key stays a number


def allowed_pairs(segment_ids_BT: Array, start: int, stop: int) -> Array:
    """Which keys before ``stop`` the queries start..stop-1 may see, [B, stop - start, stop]."""
    query_BT1, key_B1S = segment_ids_BT[:, start:stop, None], segment_ids_BT[:, None, :stop]
    causal_TS = jnp.arange(start, stop)[:, None] >= jnp.arange(stop)
    return (query_BT1 == key_B1S) & causal_TS & (query_BT1 > 0)


def masked_softmax(logits_BNTS: Array, allowed_BTS: Array) -> tuple[Array, Array]:
    """f32 softmax over allowed keys (zeros for a query without any), and the largest allowed logit per head, [B, N]."""
    allowed_BNTS = allowed_BTS[:, None]
    logits_BNTS = jnp.where(allowed_BNTS, logits_BNTS, MASKED)
    row_max_BNT1 = jax.lax.stop_gradient(jnp.max(logits_BNTS, axis=-1, keepdims=True))
    weights_BNTS = jnp.where(allowed_BNTS, jnp.exp(logits_BNTS - row_max_BNT1), 0)
    total_BNT1 = jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    return weights_BNTS / jnp.where(total_BNT1 > 0, total_BNT1, 1), jnp.max(row_max_BNT1, axis=(2, 3))


def plain_attention(q_BNTX: Array, k_BNSX: Array, v_BNSW: Array, segment_ids_BT: Array, scale: float):
    """o [B, N, T, W] and the largest logit per sequence and head [B, N], all pairs at once."""
    allowed_BTS = allowed_pairs(segment_ids_BT, 0, segment_ids_BT.shape[1])
    weights_BNTS, max_logits_BN = masked_softmax(scale * product("BNTX,BNSX->BNTS", q_BNTX, k_BNSX), allowed_BTS)
    o_BNTW = product("BNTS,BNSW->BNTW", weights_BNTS.astype(v_BNSW.dtype), v_BNSW)
    return o_BNTW.astype(v_BNSW.dtype), max_logits_BN


def _blocks(T: int) -> list[tuple[int, int]]:
    rows = max(256, -(-T // 8))
    return [(start, min(start + rows, T)) for start in range(0, T, rows)]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attention(q_BNTX: Array, k_BNSX: Array, v_BNSW: Array, segment_ids_BT: Array, scale: float):
    """Like ``plain_attention``; the second result has no gradient."""
    return _forward(q_BNTX, k_BNSX, v_BNSW, segment_ids_BT, scale)[0]


def _forward(q_BNTX: Array, k_BNSX: Array, v_BNSW: Array, segment_ids_BT: Array, scale: float):
    k_BNXS = transposed(k_BNSX)
    outputs, lses, maxima = [], [], []
    for start, stop in _blocks(q_BNTX.shape[2]):
        allowed_BNTS = allowed_pairs(segment_ids_BT, start, stop)[:, None]
        logits_BNTS = scale * product("BNTX,BNXS->BNTS", q_BNTX[:, :, start:stop], k_BNXS[..., :stop])
        logits_BNTS = jnp.where(allowed_BNTS, logits_BNTS, MASKED)
        max_BNT1 = jnp.max(logits_BNTS, axis=-1, keepdims=True)
        weights_BNTS = jnp.where(allowed_BNTS, jnp.exp(logits_BNTS - max_BNT1), 0)
        total_BNT1 = jnp.maximum(jnp.sum(weights_BNTS, axis=-1, keepdims=True), 1e-30)
        o_BNTW = product("BNTS,BNSW->BNTW", weights_BNTS.astype(v_BNSW.dtype), v_BNSW[:, :, :stop]) / total_BNT1
        outputs.append(o_BNTW.astype(v_BNSW.dtype))
        lses.append(max_BNT1 + jnp.log(total_BNT1))
        maxima.append(jnp.max(max_BNT1, axis=(2, 3)))
    o_BNTW, lse_BNT1 = jnp.concatenate(outputs, axis=2), jnp.concatenate(lses, axis=2)
    max_logits_BN = jnp.max(jnp.stack(maxima), axis=0)
    return (o_BNTW, max_logits_BN), (q_BNTX, k_BNSX, v_BNSW, segment_ids_BT, o_BNTW, lse_BNT1)


def _backward(scale: float, residuals, cotangents):
    q_BNTX, k_BNSX, v_BNSW, segment_ids_BT, o_BNTW, lse_BNT1 = residuals
    do_BNTW, _ = cotangents
    dtype, T = q_BNTX.dtype, q_BNTX.shape[2]
    delta_BNT1 = jnp.sum(do_BNTW.astype(jnp.float32) * o_BNTW.astype(jnp.float32), axis=-1, keepdims=True)
    k_BNXS, v_BNWS = transposed(k_BNSX), transposed(v_BNSW)
    q_BNXT, do_BNWT = transposed(q_BNTX), transposed(do_BNTW)
    dq, dk_BNXS, dv_BNWS = [], jnp.zeros(k_BNXS.shape, jnp.float32), jnp.zeros(v_BNWS.shape, jnp.float32)
    for start, stop in _blocks(T):
        rows = slice(start, stop)
        allowed_BNTS = allowed_pairs(segment_ids_BT, start, stop)[:, None]
        logits_BNTS = scale * product("BNTX,BNXS->BNTS", q_BNTX[:, :, rows], k_BNXS[..., :stop])
        weights_BNTS = jnp.where(allowed_BNTS, jnp.exp(logits_BNTS - lse_BNT1[:, :, rows]), 0)
        dweights_BNTS = product("BNTW,BNWS->BNTS", do_BNTW[:, :, rows], v_BNWS[..., :stop])
        dlogits_BNTS = (scale * weights_BNTS * (dweights_BNTS - delta_BNT1[:, :, rows])).astype(dtype)
        dq.append(product("BNTS,BNSX->BNTX", dlogits_BNTS, k_BNSX[:, :, :stop]).astype(dtype))
        dk_BNXS = dk_BNXS.at[..., :stop].add(product("BNXT,BNTS->BNXS", q_BNXT[..., rows], dlogits_BNTS))
        dv_BNWS = dv_BNWS.at[..., :stop].add(product("BNWT,BNTS->BNWS", do_BNWT[..., rows], weights_BNTS.astype(dtype)))
    # The barrier keeps XLA:CPU from folding these transposes into the products, in a form that it cannot run in bf16.
    dk_BNXS, dv_BNWS = jax.lax.optimization_barrier((dk_BNXS, dv_BNWS))
    dk_BNSX, dv_BNSW = dk_BNXS.swapaxes(2, 3).astype(dtype), dv_BNWS.swapaxes(2, 3).astype(dtype)
    return jnp.concatenate(dq, axis=2), dk_BNSX, dv_BNSW, None


attention.defvjp(_forward, _backward)
