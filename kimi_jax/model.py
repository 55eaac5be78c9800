"""Kimi-K2: embedding, dense blocks, a scan over mixture-of-experts blocks, norm, head.

Parameters are a nested dict with one leading "layers" axis per stack:

    embedding  dense_layers/...  moe_layers/...  norm  lm_head

``specs(cfg)`` declares every one of them; see ``layers.block.specs`` for what a block holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.dims import VOCAB, Array, Params, ParamSpec, Specs, is_spec, map_specs
from kimi_jax.errors import UserError
from kimi_jax.layers import block, mla
from kimi_jax.layers.linear import product
from kimi_jax.layers.module import declare
from kimi_jax.layers.norm import rms_norm
from kimi_jax.layers.rope import angles

REMAT_POLICIES = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep the products with weights
    "full": jax.checkpoint_policies.nothing_saveable,  # keep a block's input alone
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(  # keep it in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[block.INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(table_VD: Array, tokens_BT: Array, dtype: Any) -> Array:
    """The tokens' rows of the table; its gradient is added up in f32, for one id may stand at many places."""
    return table_VD[tokens_BT].astype(dtype)


def _lookup_fwd(table_VD: Array, tokens_BT: Array, dtype: Any):
    return lookup(table_VD, tokens_BT, dtype), (table_VD, tokens_BT)


def _lookup_bwd(_, residuals, dx_BTD: Array):
    table_VD, tokens_BT = residuals
    sums_VD = jnp.zeros(table_VD.shape, jnp.float32).at[tokens_BT].add(dx_BTD.astype(jnp.float32))
    return sums_VD.astype(table_VD.dtype), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


class Ops(NamedTuple):
    """The computations of a forward pass that a mesh does in ways of its own."""

    block: block.Ops = block.Ops()
    lookup: Callable = lookup


ON_ONE_DEVICE = Ops()


class Stats(NamedTuple):
    """What a forward pass reports on request."""

    max_logits_LN: Array  # f32: per layer and head, the largest attention logit over allowed pairs of the batch
    load_LE: Array  # f32: per MoE layer, valid tokens that chose each expert
    balance_loss: Array  # f32 scalar: sequence-wise balance loss, mean over MoE layers, unweighted
    experts_LBTK: Array  # int32: the router's choice in every MoE layer


def specs(cfg: ModelConfig) -> Specs:
    """Shape, logical axes and initialisation of every parameter."""
    V, D, std = cfg.vocab_size, cfg.hidden_size, cfg.initializer_range
    tree: dict = _top_specs(V, D, std)
    for name, n_layers, dense in _stacks(cfg):
        tree[name] = map_specs(lambda spec, n=n_layers: spec.stacked(n), block.specs(cfg, dense))
    return tree


def _top_specs(V: int, D: int, std: float) -> Specs:
    return {
        "embedding": ParamSpec((V, D), (VOCAB, "embed"), std),
        "norm": ParamSpec((D,), ("embed",), fill=1.0),
        "lm_head": ParamSpec((D, V), ("embed", VOCAB), std),
    }


def _stacks(cfg: ModelConfig) -> list[tuple[str, int, bool]]:
    """(name, number of layers, whether dense) of each stack that has layers, in the order of the forward pass."""
    stacks = [("dense_layers", cfg.first_k_dense_replace, True), ("moe_layers", cfg.n_moe_layers, False)]
    return [stack for stack in stacks if stack[1]]


def parameter_count(cfg: ModelConfig) -> int:
    """Trained parameters; the router's selection bias is a buffer and not counted."""
    leaves = jax.tree.leaves(specs(cfg), is_leaf=is_spec)
    return sum(math.prod(spec.shape) for spec in leaves if not spec.is_buffer)


def init_params(cfg: ModelConfig, seed: int) -> Params:
    """New weights, each leaf from a key of its own: like ``KimiK2.init``, but compiled in a third of the time."""
    leaves, tree = jax.tree.flatten(specs(cfg), is_leaf=is_spec)
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), len(leaves))
    dtypes = [jnp.float32 if spec.is_buffer else cfg.param_dtype for spec in leaves]
    return tree.unflatten(spec.init(key, dtype) for spec, key, dtype in zip(leaves, keys, dtypes, strict=True))


def in_compute_dtype(cfg: ModelConfig, params: Params) -> Params:
    """The weights in ``cfg.dtype``, for use without gradients; the router, which runs in f32, keeps its own."""

    def cast(spec: ParamSpec, w: Array) -> Array:
        return w if "router" in spec.axes or spec.is_buffer else w.astype(cfg.dtype)

    return jax.tree.map(cast, specs(cfg), params, is_leaf=is_spec)


def positions(cfg: ModelConfig, positions_BT: Array) -> mla.Positions:
    return mla.Positions(*angles(positions_BT, cfg.rope, cfg.qk_rope_head_dim))


def head(params: Params, x_BTD: Array) -> Array:
    """f32 logits of normed hidden states."""
    return product("BTD,DV->BTV", x_BTD, params["lm_head"].astype(x_BTD.dtype))


class KimiK2(nn.Module):
    """``apply({"params": params}, tokens_BT) -> logits_BTV`` in f32.

    ``positions_BT`` defaults to 0..T-1. Tokens attend within their ``segment_ids_BT`` only (packed documents);
    segment 0 is padding and counts in no statistic. ``stats=True`` returns ``(logits, Stats)``.
    """

    cfg: ModelConfig
    ops: Ops = ON_ONE_DEVICE

    def setup(self):
        cfg = self.cfg
        if cfg.remat not in REMAT_POLICIES:
            raise UserError(f"unknown model.remat {cfg.remat!r}; there are {', '.join(REMAT_POLICIES)}")
        policy = REMAT_POLICIES[cfg.remat]
        layer = nn.remat(block.Block, prevent_cse=False, policy=policy) if policy else block.Block
        self.top = declare(self, _top_specs(cfg.vocab_size, cfg.hidden_size, cfg.initializer_range), cfg.param_dtype)
        for name, n_layers, dense in _stacks(cfg):
            stack = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=n_layers,
            )
            setattr(self, name, stack(cfg, dense, self.ops.block))

    def __call__(
        self, tokens_BT: Array, positions_BT: Array | None = None, segment_ids_BT: Array | None = None, stats=False
    ):
        x_BTD, found = self.hidden_states(tokens_BT, positions_BT, segment_ids_BT)
        logits_BTV = head(self.top, x_BTD)
        return (logits_BTV, found) if stats else logits_BTV

    def hidden_states(
        self, tokens_BT: Array, positions_BT: Array | None = None, segment_ids_BT: Array | None = None
    ) -> tuple[Array, Stats]:
        """Normed hidden states [B, T, D], whose product with the head gives the logits, and the statistics."""
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        if segment_ids_BT is None:
            segment_ids_BT = jnp.ones_like(tokens_BT)
        cfg = self.cfg
        pos = positions(cfg, positions_BT)
        x_BTD = self.ops.lookup(self.top["embedding"], tokens_BT, cfg.dtype)
        found = []
        for name, _, _ in _stacks(cfg):
            x_BTD, stats = getattr(self, name)(x_BTD, pos, segment_ids_BT)
            found.append(stats)
        x_BTD = rms_norm(x_BTD, self.top["norm"], cfg.rms_norm_eps)
        return x_BTD, _gather_stats(cfg, found)


def hidden_states(
    cfg: ModelConfig,
    params: Params,
    tokens_BT: Array,
    positions_BT: Array,
    segment_ids_BT: Array,
    ops: Ops = ON_ONE_DEVICE,
) -> tuple[Array, Stats]:
    """``KimiK2.hidden_states`` as a pure function."""
    found: Any = KimiK2(cfg, ops).apply(
        {"params": params}, tokens_BT, positions_BT, segment_ids_BT, method=KimiK2.hidden_states
    )
    return found


def _gather_stats(cfg: ModelConfig, found: list[block.BlockStats]) -> Stats:
    max_logits_LBN = jnp.concatenate([s.max_logits_BN for s in found])
    max_logits_LN = jnp.max(max_logits_LBN, axis=1)
    if not cfg.n_moe_layers:
        return Stats(max_logits_LN, jnp.zeros((0, cfg.n_routed_experts)), jnp.zeros(()), jnp.zeros(0, jnp.int32))
    moe = found[-1]
    return Stats(max_logits_LN, moe.load_E, jnp.mean(moe.balance_loss), moe.experts_BTK)
