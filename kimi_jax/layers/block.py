"""One decoder block, dense or mixture-of-experts.

x += attention(RMS(x));  x += feed_forward(RMS(x))
feed_forward(x) = SwiGLU(x)  or  sum_k w_k expert_k(x) + SwiGLU_shared(x)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params, ParamSpec, Specs
from kimi_jax.layers import experts, mla, mlp, router
from kimi_jax.layers.linear import UNSPLIT, Split
from kimi_jax.layers.module import declare
from kimi_jax.layers.norm import rms_norm


def as_they_are(p: Params, specs: Specs, dtype: Any) -> Params:
    return p


class Ops(NamedTuple):
    """The computations of a block that a mesh does in ways of its own."""

    weights: Callable = as_they_are  # p, specs, dtype of the computation -> p, as the layers use it
    attend: Callable = mla.expanded_attention
    run_experts: Callable = experts.run


ON_ONE_DEVICE = Ops()


INPUT = "block_input"  # what a remat policy can name


class BlockStats(NamedTuple):
    """What one block can report; all but the first have no entries in a dense block."""

    max_logits_BN: Array  # largest attention logit over allowed pairs
    load_E: Array  # valid tokens per expert
    balance_loss: Array  # sequence-wise, unweighted
    experts_BTK: Array  # the router's choice


def specs(cfg: ModelConfig, dense: bool) -> Specs:
    D, std = cfg.hidden_size, cfg.initializer_range
    gain = ParamSpec((D,), ("embed",), fill=1.0)
    common = {"attn_norm": gain, "attn": mla.specs(cfg), "mlp_norm": gain}
    if dense:
        return common | {"mlp": mlp.specs(D, cfg.intermediate_size, std)}
    return common | {"moe": {"router": router.specs(cfg), **experts.specs(cfg)}}


def attend(
    p: Params, cfg: ModelConfig, x_BTD: Array, pos: mla.Positions, segment_ids_BT: Array, ops: Ops = ON_ONE_DEVICE
) -> tuple[Array, Array]:
    """x plus naive attention over the tokens of x themselves, and the largest logits [B, N]."""
    h_BTD = rms_norm(x_BTD, p["attn_norm"], cfg.rms_norm_eps)
    query, latent = mla.queries(p["attn"], cfg, h_BTD, pos), mla.latents(p["attn"], cfg, h_BTD, pos)
    y_BTD, max_logits_BN = mla.naive(p["attn"], cfg, query, latent, segment_ids_BT, ops.attend)
    return x_BTD + y_BTD, max_logits_BN


def feed_forward(
    p: Params, cfg: ModelConfig, x_BTD: Array, run_experts: Callable = experts.run, split: Split = UNSPLIT
) -> tuple[Array, router.Routing | None]:
    """x plus the block's feed-forward layer, and the routing if there was any."""
    h_BTD = rms_norm(x_BTD, p["mlp_norm"], cfg.rms_norm_eps)
    if "mlp" in p:
        return x_BTD + split.total(mlp.mlp(p["mlp"], h_BTD)), None
    routing = router.route(p["moe"]["router"], cfg, h_BTD, split)
    y_BTD = run_experts(p["moe"], cfg, h_BTD, routing.weights_BTK, routing.experts_BTK)
    return x_BTD + split.total(y_BTD), routing


class Block(nn.Module):
    """Binds one block's parameters; ``nn.scan`` stacks it."""

    cfg: ModelConfig
    dense: bool
    ops: Ops = ON_ONE_DEVICE

    @nn.compact
    def __call__(self, x_BTD: Array, pos: mla.Positions, segment_ids_BT: Array) -> tuple[Array, BlockStats]:
        x_BTD = checkpoint_name(x_BTD, INPUT)
        declared = specs(self.cfg, self.dense)
        p = self.ops.weights(declare(self, declared, self.cfg.param_dtype), declared, self.cfg.dtype)
        x_BTD, max_logits_BN = attend(p, self.cfg, x_BTD, pos, segment_ids_BT, self.ops)
        x_BTD, routing = feed_forward(p, self.cfg, x_BTD, self.ops.run_experts)
        if routing is None:
            none = jnp.zeros(0)
            return x_BTD, BlockStats(max_logits_BN, none, none, none)
        valid_BT = segment_ids_BT > 0
        load_BE = router.loads(routing, valid_BT)
        loss = router.sequence_balance_loss(routing, load_BE, valid_BT)
        return x_BTD, BlockStats(max_logits_BN, jnp.sum(load_BE, axis=0), loss, routing.experts_BTK)
