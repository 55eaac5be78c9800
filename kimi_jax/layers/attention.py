"""Masks, the f32 softmax, and the per-head maximum of the attention logits."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array

MASKED = -1e30  # finite: a query with no allowed key gets uniform weights instead of NaN


def causal_mask(segment_ids_BT: Array) -> Array:
    """Which keys a query may see, [B, T, S]: not later ones, and those of its own segment; segment 0 is padding."""
    T = segment_ids_BT.shape[1]
    same_BTS = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
    causal_TS = jnp.tril(jnp.ones((T, T), bool))
    return same_BTS & causal_TS & (segment_ids_BT > 0)[:, :, None]


def masked_softmax(logits_BNTS: Array, allowed_BTS: Array) -> tuple[Array, Array]:
    """Softmax over allowed keys in f32, and the largest allowed logit per sequence and head, [B, N].

    The second result is QK-Clip's signal (Kimi K2 report, section 2.1): a signed maximum over allowed pairs only,
    outside the gradient. It costs one reduction of the row maxima that the softmax needs anyway.
    """
    logits_BNTS = jnp.where(allowed_BTS[:, None], logits_BNTS.astype(jnp.float32), MASKED)
    row_max_BNT1 = lax.stop_gradient(jnp.max(logits_BNTS, axis=-1, keepdims=True))
    weights_BNTS = jnp.exp(logits_BNTS - row_max_BNT1)
    weights_BNTS /= jnp.sum(weights_BNTS, axis=-1, keepdims=True)
    return weights_BNTS, jnp.max(row_max_BNT1, axis=(2, 3))
