"""Causal attention on TPU by tokamax's splash kernels, which also say the largest logit of every row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from kimi_jax.dims import Array
from kimi_jax.errors import UserError

BLOCKS = (1024, 512, 256, 128)  # rows and columns of logits at once; the backward pass keeps least with the largest
NONE_ALLOWED = -1e30  # what layers.attention says of a head without any allowed pair


def splash_attention(
    q_BNTX: Array, k_BNSX: Array, v_BNSW: Array, segment_ids_BT: Array, scale: float, *, interpret: bool = False
) -> tuple[Array, Array]:
    """As ``layers.attention.attention``, for T a multiple of 128; what comes out for padding is finite, no more."""
    splash = _tokamax()
    _, N, T, X = q_BNTX.shape
    W = v_BNSW.shape[-1]
    block = next((b for b in BLOCKS if T % b == 0), None)
    if block is None:
        raise UserError(f"attention on TPU takes sequences of a multiple of 128 tokens: change seq_len ({T})")
    forward = dict(block_q=block, block_kv=block, block_kv_compute=block)
    backward = dict(block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block, dq_reduction_steps=3)
    pairs = N * T * (T + block) // 2  # in blocks on the diagonal and below: what the kernels compute
    costs = dict(
        fwd_cost_estimate=_cost(pairs * (X + W), pairs, N * T * (2 * X + 2 * W), q_BNTX.dtype),
        bwd_cost_estimate=_cost(pairs * (3 * X + 2 * W), pairs, N * T * (4 * X + 4 * W), q_BNTX.dtype),
    )
    kernel = splash.splash_attention_kernel.make_splash_mha(
        splash.splash_attention_mask.CausalMask((T, T)),
        config=splash.splash_attention_kernel.SplashConfig(**forward, **backward, **costs, interpret=interpret),
        save_residuals=True,
        q_seq_shards=1,
    )

    def one(q_NTX: Array, k_NSX: Array, v_NSW: Array, segment_ids_T: Array):
        ids = splash.splash_attention_kernel.SegmentIds(segment_ids_T, segment_ids_T)
        return kernel(q_NTX, k_NSX, v_NSW, ids)

    scaled_BNTX = (q_BNTX.astype(jnp.float32) * scale).astype(q_BNTX.dtype)
    o_BNTW, stats = jax.vmap(one)(scaled_BNTX, k_BNSX, v_BNSW, segment_ids_BT)
    largest_BNT = jnp.where(segment_ids_BT[:, None] > 0, jax.lax.stop_gradient(stats["max_logits"]), NONE_ALLOWED)
    return o_BNTW, jnp.max(largest_BNT, axis=2)


def _cost(products: int, exponentials: int, numbers: int, dtype: Any) -> pl.CostEstimate:
    return pl.CostEstimate(
        flops=2 * products, transcendentals=exponentials, bytes_accessed=numbers * jnp.dtype(dtype).itemsize
    )


def _tokamax() -> Any:
    try:
        from tokamax._src.ops.experimental.tpu import splash_attention
        from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
    except ImportError as error:
        raise UserError("attention on TPU needs tokamax: pip install '.[tpu]' in the checkout") from error
    del splash_attention_kernel, splash_attention_mask
    return splash_attention
