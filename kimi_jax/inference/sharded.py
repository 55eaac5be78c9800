"""The engine's step spread over the devices of one mesh axis, "expert".

Weights are split by heads, hidden units, ranks, vocabulary and experts, so that all devices together read each of them
once a step. The cache is split by request: a request's pages lie on one device. What layers compute of tokens,
[B, T, D], is small in comparison and the same on all devices, which add up their parts of it after attention and after
the feed-forward layer. Between the projections of attention, queries travel from the device that has their head to the
one that has their row, and the mixed latents back.

Experts read the rows that chose them in pieces of a fixed size: memory does not grow if all tokens choose one device's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from kimi_jax.dims import Array, Params
from kimi_jax.inference.ops import Ops
from kimi_jax.layers.dispatch import sort_assignments
from kimi_jax.layers.experts import fastest_experts_of
from kimi_jax.layers.linear import Split
from kimi_jax.model import head, lookup

AXIS = "expert"
LEAST_ROWS = 64  # that experts take at once


def serving_mesh(devices: Sequence[Any]) -> Mesh:
    """All devices along one axis, laid on the slice's torus."""
    return Mesh(mesh_utils.create_device_mesh((len(devices),), devices), (AXIS,))


def sharded_ops(rows_Sb: Array, B: int, vocab_size: int) -> Ops:
    """Inside a ``shard_map`` over AXIS: ``rows_Sb`` are the rows of B that live on each device, padded with B."""
    return Ops(
        lookup=_lookup,
        own_rows=partial(_own_rows, rows_Sb),
        to_rows=partial(_to_rows, rows_Sb),
        to_heads=partial(_to_heads, rows_Sb, B),
        all_heads=lambda w: jax.tree.map(lambda a: lax.all_gather(a, AXIS, axis=1, tiled=True), w),
        split=Split(
            whole=lambda x, n: lax.all_gather(x, AXIS, axis=x.ndim - 1, tiled=True)[..., :n],
            total=lambda y: lax.psum(y, AXIS),
        ),
        experts_of=_experts_of,
        head=partial(_head, vocab_size),
        share=_share,
        gathered=lambda tree, B: jax.tree.map(lambda a: lax.all_gather(a, AXIS, tiled=True)[:B], tree),
    )


def _lookup(table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
    at_BT = tokens_BT - lax.axis_index(AXIS) * table_VD.shape[0]
    here_BT = (at_BT >= 0) & (at_BT < table_VD.shape[0])
    rows_BTD = lookup(table_VD, jnp.where(here_BT, at_BT, 0), dtype)
    return lax.psum(jnp.where(here_BT[..., None], rows_BTD, 0), AXIS)


def _own_rows(rows_Sb: Array, a_B: Array) -> Array:
    return a_B.at[rows_Sb[lax.axis_index(AXIS)]].get(mode="fill", fill_value=0)


def _to_rows(rows_Sb: Array, x_BTnX: Array) -> Array:
    x_SbTnX = lax.all_to_all(x_BTnX.at[rows_Sb].get(mode="fill", fill_value=0), AXIS, 0, 0)
    x_bTSnX = jnp.moveaxis(x_SbTnX, 0, 2)
    return x_bTSnX.reshape(*x_bTSnX.shape[:2], -1, x_bTSnX.shape[-1])


def _to_heads(rows_Sb: Array, B: int, x_bTNX: Array) -> Array:
    (b, T, N, X), S = x_bTNX.shape, len(rows_Sb)
    x_SbTnX = lax.all_to_all(jnp.moveaxis(x_bTNX.reshape(b, T, S, N // S, X), 2, 0), AXIS, 0, 0)
    return jnp.zeros((B, T, N // S, X), x_bTNX.dtype).at[rows_Sb].set(x_SbTnX, mode="drop")


def _experts_of(stack: Params, layer: Array, x_MD: Array, weights_MK: Array, experts_MK: Array) -> Array:
    """What the experts that are here give, of all tokens."""
    S, e, K = lax.axis_size(AXIS), stack["gate"].shape[1], experts_MK.shape[1]
    here_MK = experts_MK - lax.axis_index(AXIS) * e
    here_MK = jnp.where((here_MK >= 0) & (here_MK < e), here_MK, e)
    order = sort_assignments(here_MK, e)  # those that are here come first
    n, R = jnp.sum(order.sizes_E), min(here_MK.size, max(LEAST_ROWS, 16 * -(-here_MK.size // (8 * S))))

    def piece(r: Array, y_MD: Array) -> Array:
        at_R = r * R + jnp.arange(R)
        assignment_R = order.order_A.at[at_R].get(mode="clip")
        expert_R = jnp.where(at_R < n, here_MK.reshape(-1)[assignment_R], e)
        token_R, weight_R1 = assignment_R // K, weights_MK.reshape(-1, 1)[assignment_R]
        y_RD = fastest_experts_of(stack, layer, x_MD[token_R], jnp.ones_like(weight_R1), expert_R[:, None])
        y_RD = jnp.where(at_R[:, None] < n, weight_R1 * y_RD.astype(jnp.float32), 0)
        return y_MD.at[token_R].add(y_RD)

    y_MD = lax.fori_loop(0, -(-n // R), piece, jnp.zeros(x_MD.shape, jnp.float32))
    return y_MD.astype(x_MD.dtype)


def _head(vocab_size: int, params: Params, x_BTD: Array) -> Array:
    """Logits of all B rows over a part of the vocabulary, exchanged for those of a share of the rows over all of it."""
    x_SbTD = _shares(x_BTD)
    logits_SbTv = head(params, x_SbTD.reshape(-1, *x_SbTD.shape[2:])).reshape(*x_SbTD.shape[:3], -1)
    logits_bTSv = jnp.moveaxis(lax.all_to_all(logits_SbTv, AXIS, 0, 0), 0, 2)
    return logits_bTSv.reshape(*logits_bTSv.shape[:2], -1)[..., :vocab_size]


def _shares(a_B: Array) -> Array:
    """[S, b, ...], b rows for each device, padded with zeros."""
    S, B = lax.axis_size(AXIS), len(a_B)
    return jnp.pad(a_B, [(0, -B % S)] + [(0, 0)] * (a_B.ndim - 1)).reshape(S, -(-B // S), *a_B.shape[1:])


def _share(tree: Any) -> Any:
    return jax.tree.map(lambda a: _shares(a)[lax.axis_index(AXIS)], tree)
