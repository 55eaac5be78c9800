"""Cross-entropy without ever holding the logits of a whole batch.

    loss = sum_t weight_t (log sum_v exp(z_tv) - z_t,target),    z = x W_head

The tokens are taken in chunks; each chunk's logits exist once, in f32, and its gradients are formed while they do. At
163,840 words a full [B, T, V] would outweigh everything else.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.dims import Array
from kimi_jax.layers.linear import product, weight_gradient

CHUNK_ELEMENTS = 2**24  # logits held at once, at most


@jax.custom_vjp
def cross_entropy(x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array) -> Array:
    """The weighted sum of token losses, in nats, f32. Differentiable in ``x`` and ``head``."""
    x_cMD, targets_cM, weights_cM = _chunked(x_BTD, targets_BT, weights_BT, head_DV.shape[1])
    head = head_DV.astype(x_BTD.dtype)

    def step(total: Array, chunk):
        return total + _chunk_loss(chunk, head)[0], None

    return lax.scan(step, jnp.zeros((), jnp.float32), (x_cMD, targets_cM, weights_cM))[0]


def _chunk_loss(chunk, head_DV: Array):
    x_MD, targets_M, weights_M = chunk
    logits_MV = product("MD,DV->MV", x_MD, head_DV)
    lse_M = jax.nn.logsumexp(logits_MV, axis=-1)
    target_M = jnp.take_along_axis(logits_MV, targets_M[:, None], axis=-1)[:, 0]
    return jnp.sum(jnp.where(weights_M != 0, weights_M * (lse_M - target_M), 0)), logits_MV, lse_M


def _forward(x_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array):
    D, V = head_DV.shape
    chunks = _chunked(x_BTD, targets_BT, weights_BT, V)
    head = head_DV.astype(x_BTD.dtype)

    def step(carry, chunk):
        total, dhead_DV = carry
        x_MD, targets_M, weights_M = chunk
        loss, logits_MV, lse_M = _chunk_loss(chunk, head)
        probs_MV = jnp.exp(logits_MV - lse_M[:, None])
        hit_MV = jnp.arange(V) == targets_M[:, None]
        dlogits_MV = jnp.where(weights_M[:, None] != 0, weights_M[:, None] * (probs_MV - hit_MV), 0).astype(x_MD.dtype)
        dhead_DV += weight_gradient("MD,MV->DV", x_MD, dlogits_MV)
        return (total + loss, dhead_DV), product("MV,DV->MD", dlogits_MV, head)

    start = (jnp.zeros((), jnp.float32), jnp.zeros((D, V), jnp.float32))
    (total, dhead_DV), dx_cMD = lax.scan(step, start, chunks)
    M = x_BTD.shape[0] * x_BTD.shape[1]
    dx_BTD = dx_cMD.reshape(-1, D)[:M].reshape(x_BTD.shape)
    return total, (dx_BTD, dhead_DV, jnp.zeros((), x_BTD.dtype), jnp.zeros((), head_DV.dtype))


def _backward(residuals, scale: Array):
    dx_BTD, dhead_DV, like_x, like_head = residuals
    return (scale * dx_BTD).astype(like_x.dtype), (scale * dhead_DV).astype(like_head.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def _chunked(x_BTD: Array, targets_BT: Array, weights_BT: Array, V: int):
    """Tokens flattened, padded with weight 0 and cut into chunks of at most CHUNK_ELEMENTS logits."""
    M = targets_BT.size
    n_chunks = -(-M * V // CHUNK_ELEMENTS)
    rows = -(-M // n_chunks)

    def cut(a: Array) -> Array:
        flat = a.reshape(M, *a.shape[2:])
        padded = jnp.pad(flat, ((0, n_chunks * rows - M), *((0, 0),) * (flat.ndim - 1)))
        return padded.reshape(n_chunks, rows, *flat.shape[1:])

    return cut(x_BTD), cut(targets_BT), cut(weights_BT)
