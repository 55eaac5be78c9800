"""One step of the model over the paged cache: any number of new tokens per row, prefill and decode alike.

Row b holds ``length`` new tokens, which follow the ``start`` tokens that its pages hold already. Every layer writes its
latents to the pages first; then its queries attend to all positions up to their own. Rows are padded on the right to a
common width, and rows without tokens fill up the batch: padding is written to page 0, goes to no expert, and its
results mean nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.inference import attention, cache
from kimi_jax.layers import block, mla
from kimi_jax.layers.experts import fastest_experts_of
from kimi_jax.layers.norm import rms_norm
from kimi_jax.model import embed, head, positions

ROWS = 256  # of logits at a time, where all new tokens have some


def forward(
    params: Params,
    cfg: ModelConfig,
    cache_LPGX: Array,
    tokens_BT: Array,
    start_B: Array,
    length_B: Array,
    pages_BP: Array,
    experts_of: Callable = fastest_experts_of,
) -> tuple[Array, Array]:
    """Normed hidden states [B, T, D] of the new tokens, and the cache with their latents.

    ``params`` as from ``model.in_compute_dtype``. ``experts_of(stack, layer, x_MD, weights_MK, experts_MK) -> y_MD``
    gets an expert index past the last for what goes to no expert.
    """
    i_T = jnp.arange(tokens_BT.shape[1])
    valid_BT = i_T < length_B[:, None]
    pos_BT = jnp.maximum(jnp.minimum(start_B[:, None] + i_T, (start_B + length_B)[:, None] - 1), 0)
    angles = positions(cfg, pos_BT)
    x_BTD = embed(params, cfg, tokens_BT)
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
            q, kv = (f(p["attn"], cfg, h_BTD, angles) for f in (mla.queries, mla.latents))
            new_BTX = jnp.concatenate(kv, axis=-1)
            cache_LPGX = cache.write(cache_LPGX, first + i, new_BTX, pages_BP, start_B, length_B)
            x_BTD += attention.attend(p["attn"], cfg, q, cache_LPGX, first + i, pages_BP, pos_BT)

            def experts(_, cfg, x_BTD, weights_BTK, experts_BTK):
                rows = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTK, chosen(cfg, experts_BTK)))
                return experts_of(stack, i, *rows).reshape(x_BTD.shape)

            x_BTD, _ = block.feed_forward(p, cfg, x_BTD, experts)
            return (x_BTD, cache_LPGX), None

        def chosen(cfg: ModelConfig, experts_BTK: Array) -> Array:
            return jnp.where(valid_BT[..., None], experts_BTK, cfg.n_routed_experts)

        n_layers = p["attn_norm"].shape[0]
        (x_BTD, cache_LPGX), _ = lax.scan(step, (x_BTD, cache_LPGX), (jnp.arange(n_layers), sliced))
        first += n_layers
    return rms_norm(x_BTD, params["norm"], cfg.rms_norm_eps), cache_LPGX


def logits(params: Params, x_BTD: Array, first_B: Array, J: int) -> Array:
    """f32 logits [B, J, V] after the new tokens first .. first + J - 1 of every row."""
    at_BJ = jnp.clip(first_B[:, None] + jnp.arange(J), 0, x_BTD.shape[1] - 1)
    return head(params, jnp.take_along_axis(x_BTD, at_BJ[..., None], axis=1))


def logprobs(params: Params, x_BTD: Array, next_BT: Array) -> Array:
    """log softmax at one given token after every new token, f32 [B, T]; [B, T, V] is never whole."""

    def one(position: tuple[Array, Array]) -> Array:
        x_BD, next_B = position
        logits_BV = head(params, x_BD[:, None])[:, 0]
        chosen_B1 = jnp.take_along_axis(logits_BV, next_B[:, None], axis=-1)
        return chosen_B1[:, 0] - jax.nn.logsumexp(logits_BV, axis=-1)

    positions = x_BTD.swapaxes(0, 1), next_BT.swapaxes(0, 1)
    return lax.map(one, positions, batch_size=max(ROWS // x_BTD.shape[0], 1)).swapaxes(0, 1)
