"""One step of the model over the paged cache: any number of new tokens per row, prefill and decode alike.

Row b holds ``length`` new tokens, which follow the ``start`` tokens that its pages hold already. Every layer writes its
latents to the pages first; then its queries attend to all positions up to their own. Rows are padded on the right to a
common width, and rows without tokens fill up the batch: padding is written to page 0, goes to no expert, and its
results mean nothing.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.inference import attention, cache
from kimi_jax.inference.ops import ON_ONE_DEVICE, Ops
from kimi_jax.layers import block, mla
from kimi_jax.layers.experts import with_shared
from kimi_jax.layers.norm import rms_norm
from kimi_jax.model import positions


def forward(
    params: Params,
    cfg: ModelConfig,
    cache_LPGX: Array,
    tokens_BT: Array,
    start_B: Array,
    length_B: Array,
    pages_BP: Array,
    ops: Ops = ON_ONE_DEVICE,
) -> tuple[Array, Array]:
    """Normed hidden states [B, T, D] of the new tokens, and the cache with their latents.

    ``params`` as from ``model.in_compute_dtype``.
    """
    i_T = jnp.arange(tokens_BT.shape[1])
    valid_BT = i_T < length_B[:, None]
    pos_BT = jnp.maximum(jnp.minimum(start_B[:, None] + i_T, (start_B + length_B)[:, None] - 1), 0)
    angles = positions(cfg, pos_BT)
    own_start_B, own_length_B, own_pages_BP, own_pos_BT = map(ops.own_rows, (start_B, length_B, pages_BP, pos_BT))
    x_BTD = ops.lookup(params["embedding"], tokens_BT, cfg.dtype)
    first = 0
    for name in ("dense_layers", "moe_layers"):
        if name not in params:
            continue
        p = params[name]
        moe = p.get("moe")
        stack = moe["experts"] if moe else None  # read in place rather than sliced out layer by layer
        sliced = {**p, "moe": {**moe, "experts": None}} if moe else p

        def step(carry, layer, stack=stack, first=first):
            (x_BTD, cache_LPGX), (i, p) = carry, layer
            h_BTD = rms_norm(x_BTD, p["attn_norm"], cfg.rms_norm_eps)
            q, kv = (f(p["attn"], cfg, h_BTD, angles, ops.split) for f in (mla.queries, mla.latents))
            new_BTX = ops.own_rows(jnp.concatenate(kv, axis=-1))
            cache_LPGX = cache.write(cache_LPGX, first + i, new_BTX, own_pages_BP, own_start_B, own_length_B)
            y_BTD = attention.attend(p["attn"], cfg, q, cache_LPGX, first + i, own_pages_BP, own_pos_BT, ops)
            x_BTD += ops.split.total(y_BTD)

            def run_experts(p, cfg, x_BTD, weights_BTK, experts_BTK):
                rows = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTK, chosen(cfg, experts_BTK)))
                return with_shared(p, x_BTD, ops.experts_of(stack, i, *rows).reshape(x_BTD.shape))

            x_BTD, _ = block.feed_forward(p, cfg, x_BTD, run_experts, ops.split)
            return (x_BTD, cache_LPGX), None

        def chosen(cfg: ModelConfig, experts_BTK: Array) -> Array:
            return jnp.where(valid_BT[..., None], experts_BTK, cfg.n_routed_experts)

        n_layers = p["attn_norm"].shape[0]
        (x_BTD, cache_LPGX), _ = lax.scan(step, (x_BTD, cache_LPGX), (jnp.arange(n_layers), sliced))
        first += n_layers
    return rms_norm(x_BTD, params["norm"], cfg.rms_norm_eps), cache_LPGX


def after(x_BTD: Array, first_B: Array, J: int) -> Array:
    """The hidden states [B, J, D] of the new tokens first .. first + J - 1 of every row."""
    at_BJ = jnp.clip(first_B[:, None] + jnp.arange(J), 0, x_BTD.shape[1] - 1)
    return jnp.take_along_axis(x_BTD, at_BJ[..., None], axis=1)
