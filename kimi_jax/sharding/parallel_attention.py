"""Attention with sequences split over "context" and heads over "tensor": exact, the largest logits too.

Within a "context" group every device takes some of the heads for the whole sequence. Queries travel there and outputs
back, by all_to_all; of keys and values only the latents are gathered, C + R numbers a token, and each device expands
them for its own heads. So causal work is even, nothing is computed twice, and the largest logit of a head is known
where the head is. Heads that do not divide are filled up with empty ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array
from kimi_jax.layers.mla import attend_expanded
from kimi_jax.sharding.gathered import whole_weight
from kimi_jax.sharding.mesh import batch_axes, tokens
from kimi_jax.sharding.rules import TRAIN, split


def parallel_attention(mesh: Mesh | AbstractMesh, attention: Callable) -> Callable:
    """What takes the place of ``layers.mla.expanded_attention`` on ``mesh``, by ``attention`` on each device."""
    of_tokens = tokens(mesh)
    heads_of_tokens = PartitionSpec(*of_tokens, "tensor")
    heads_of_sequences = PartitionSpec(batch_axes(mesh), "tensor")

    def attend(
        kv_b: Array, cfg: ModelConfig, q_BTNX: Array, c_BTC: Array, k_rope_BTR: Array, segment_ids_BT: Array
    ) -> tuple[Array, Array]:
        over_C = split(kv_b.shape[0], TRAIN["kv_lora"], mesh)
        local = jax.shard_map(
            partial(_local, attention, cfg, mesh.shape["context"], over_C),
            mesh=mesh,
            in_specs=(PartitionSpec(over_C, "tensor"), heads_of_tokens, of_tokens, of_tokens, of_tokens),
            out_specs=(heads_of_tokens, heads_of_sequences),
            check_vma=False,
        )
        return local(kv_b, q_BTNX, c_BTC, k_rope_BTR, segment_ids_BT)

    return attend


def _local(
    attention: Callable,
    cfg: ModelConfig,
    n: int,
    over_C: tuple[str, ...],
    kv_b: Array,
    q_BTNX: Array,
    c_BTC: Array,
    k_rope_BTR: Array,
    segment_ids_BT: Array,
) -> tuple[Array, Array]:
    kv_b = whole_weight(over_C, q_BTNX.dtype, kv_b)
    if n == 1:
        return attend_expanded(attention, kv_b, cfg, q_BTNX, c_BTC, k_rope_BTR, segment_ids_BT)
    N = q_BTNX.shape[2]
    filled = -N % n
    q_BTNX = jnp.pad(q_BTNX, ((0, 0), (0, 0), (0, filled), (0, 0)))
    kv_b = jnp.pad(kv_b, ((0, 0), (0, filled), (0, 0)))
    own = (N + filled) // n
    kv_b = lax.dynamic_slice_in_dim(kv_b, lax.axis_index("context") * own, own, axis=1)
    q_BTNX = lax.all_to_all(q_BTNX, "context", split_axis=2, concat_axis=1, tiled=True)
    sequences = (lax.all_gather(a, "context", axis=1, tiled=True) for a in (c_BTC, k_rope_BTR, segment_ids_BT))
    o_BTNW, max_logits_BN = attend_expanded(attention, kv_b, cfg, q_BTNX, *sequences)
    o_BTNW = lax.all_to_all(o_BTNW, "context", split_axis=1, concat_axis=2, tiled=True)
    return o_BTNW[:, :, :N], lax.all_gather(max_logits_BN, "context", axis=1, tiled=True)[:, :N]
