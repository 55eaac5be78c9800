"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its naive form.

    cq = RMS(x W_qa)                        q = cq W_qb = [q_nope | q_rope]  per head
    [c | k_rope] = x W_kva;  c = RMS(c)     [k_nope | v] = c W_kvb           per head, k_rope shared by all heads
    logits = scale * (q_nope . k_nope + rot(q_rope) . rot(k_rope))
    y = softmax(logits) v W_o

The naive form expands keys and values from the latent: fewest operations when all keys are new, as in training. What
runs on cached latents, in this form and the absorbed one, is in ``inference.attention``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.dims import HEADS, Array, Fused, Params, ParamSpec, Specs
from kimi_jax.layers.attention import attention
from kimi_jax.layers.linear import UNSPLIT, Split, contract
from kimi_jax.layers.norm import rms_norm
from kimi_jax.layers.rope import rotate

LATENT_EPS = 1e-6  # of the latent norms, whatever the config says for the others


class Positions(NamedTuple):
    """What every layer needs to know of the token positions; computed once per forward pass."""

    cos: Array
    sin: Array


def specs(cfg: ModelConfig) -> Specs:
    D, N, C, std = cfg.hidden_size, cfg.num_attention_heads, cfg.kv_lora_rank, cfg.initializer_range
    H, R, W, Q = cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim, cfg.q_lora_rank
    nope_rope = Fused((("nope", H), ("rope", R)))
    if Q is None:
        query = {"q": ParamSpec((D, N, H + R), ("embed", HEADS, nope_rope), std)}
    else:
        query = {
            "q_a": ParamSpec((D, Q), ("embed", "q_lora"), std),
            "q_norm": ParamSpec((Q,), ("q_lora",), fill=1.0),
            "q_b": ParamSpec((Q, N, H + R), ("q_lora", HEADS, nope_rope), std),
        }
    return query | {
        "kv_a": ParamSpec((D, C + R), ("embed", Fused((("latent", C), ("rope_key", R)))), std),
        "kv_norm": ParamSpec((C,), ("kv_lora",), fill=1.0),
        "kv_b": ParamSpec((C, N, H + W), ("kv_lora", HEADS, Fused((("nope", H), ("value", W)))), std),
        "o": ParamSpec((N, W, D), (HEADS, "value", "embed"), std),
    }


def queries(p: Params, cfg: ModelConfig, x_BTD: Array, pos: Positions, split: Split = UNSPLIT) -> tuple[Array, Array]:
    """The part without and the (rotated) part with rotation, [B, T, N, H] and [B, T, N, R]."""
    if cfg.q_lora_rank is None:
        q_BTNX = contract("BTD,DNX->BTNX", x_BTD, p["q"])
    else:
        cq_BTQ = split.whole(contract("BTD,DQ->BTQ", x_BTD, p["q_a"]), cfg.q_lora_rank)
        cq_BTQ = rms_norm(cq_BTQ, p["q_norm"], LATENT_EPS)
        q_BTNX = contract("BTQ,QNX->BTNX", cq_BTQ, p["q_b"])
    q_nope_BTNH, q_rope_BTNR = jnp.split(q_BTNX, [cfg.qk_nope_head_dim], axis=-1)
    return q_nope_BTNH, rotate(q_rope_BTNR, pos.cos, pos.sin)


def latents(p: Params, cfg: ModelConfig, x_BTD: Array, pos: Positions, split: Split = UNSPLIT) -> tuple[Array, Array]:
    """What attention keeps of each token: the normed latent [B, T, C] and the rotated shared key [B, T, R]."""
    kv_BTX = split.whole(contract("BTD,DX->BTX", x_BTD, p["kv_a"]), cfg.kv_lora_rank + cfg.qk_rope_head_dim)
    c_BTC, k_rope_BTR = jnp.split(kv_BTX, [cfg.kv_lora_rank], axis=-1)
    return rms_norm(c_BTC, p["kv_norm"], LATENT_EPS), rotate(k_rope_BTR, pos.cos, pos.sin)


def expanded_attention(
    kv_b: Array, cfg: ModelConfig, q_BTNX: Array, c_BSC: Array, k_rope_BSR: Array, segment_ids_BT: Array
) -> tuple[Array, Array]:
    """o [B, T, N, W] and the largest logits [B, N], over keys and values expanded per head from the latents."""
    return attend_expanded(attention, kv_b, cfg, q_BTNX, c_BSC, k_rope_BSR, segment_ids_BT)


def attend_expanded(
    attention: Callable,
    kv_b: Array,
    cfg: ModelConfig,
    q_BTNX: Array,
    c_BSC: Array,
    k_rope_BSR: Array,
    segment_ids_BT: Array,
) -> tuple[Array, Array]:
    """``expanded_attention`` with another computation in the place of ``layers.attention.attention``."""
    k_nope_BSNH, v_BSNW = jnp.split(contract("BSC,CNX->BSNX", c_BSC, kv_b), [cfg.qk_nope_head_dim], axis=-1)
    k_rope_BSNR = jnp.broadcast_to(k_rope_BSR[:, :, None], (*k_nope_BSNH.shape[:3], cfg.qk_rope_head_dim))
    k_BSNX = jnp.concatenate([k_nope_BSNH, k_rope_BSNR], axis=-1)
    heads_first = [a.swapaxes(1, 2) for a in (q_BTNX, k_BSNX, v_BSNW)]
    o_BNTW, max_logits_BN = attention(*heads_first, segment_ids_BT, cfg.softmax_scale)
    return o_BNTW.swapaxes(1, 2), max_logits_BN


def naive(
    p: Params,
    cfg: ModelConfig,
    q: tuple[Array, Array],
    kv: tuple[Array, Array],
    segment_ids_BT: Array,
    attend: Callable = expanded_attention,
) -> tuple[Array, Array]:
    """Attention over keys and values expanded per head. Returns y [B, T, D] and the largest logits [B, N]."""
    o_BTNW, max_logits_BN = attend(p["kv_b"], cfg, jnp.concatenate(q, axis=-1), *kv, segment_ids_BT)
    return contract("BTNW,NWD->BTD", o_BTNW, p["o"]), max_logits_BN
