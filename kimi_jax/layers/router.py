"""The sigmoid router with a selection bias, and the two ways in which Kimi-K2 balances its experts.

    s = sigmoid(x W_g)            in f32
    chosen = top_K(s + b)         the bias b steers the choice and nothing else
    w = scale * s / sum(s)        over the chosen

(DeepSeek-V3, arXiv 2412.19437, section 2.1.2.)
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import BUFFER, Array, Params, ParamSpec, Specs
from kimi_jax.layers.linear import UNSPLIT, Split


class Routing(NamedTuple):
    experts_BTK: Array  # int32, which experts each token goes to
    weights_BTK: Array  # f32, how much each counts
    scores_BTE: Array  # f32, sigmoid scores of all experts


def specs(cfg: ModelConfig) -> Specs:
    D, E = cfg.hidden_size, cfg.n_routed_experts
    return {
        "weight": ParamSpec((D, E), ("embed", "router"), cfg.initializer_range),
        "bias": ParamSpec((E,), (BUFFER,), fill=0.0),
    }


def route(p: Params, cfg: ModelConfig, x_BTD: Array, split: Split = UNSPLIT) -> Routing:
    exact = x_BTD.dtype == jnp.float32  # bf16 has 8 bits: then 16 of the weights are enough
    logits_BTE = jnp.einsum(
        "BTD,DE->BTE",
        x_BTD.astype(jnp.float32),
        p["weight"].astype(jnp.float32),
        precision=lax.Precision.HIGHEST if exact else lax.Precision.HIGH,
    )
    scores_BTE = jax.nn.sigmoid(split.whole(logits_BTE, cfg.n_routed_experts))
    _, experts_BTK = lax.top_k(lax.stop_gradient(scores_BTE + p["bias"]), cfg.num_experts_per_tok)
    weights_BTK = _of_chosen(scores_BTE, experts_BTK)
    if cfg.norm_topk_prob:
        weights_BTK /= jnp.sum(weights_BTK, axis=-1, keepdims=True) + 1e-20
    return Routing(experts_BTK, weights_BTK * cfg.routed_scaling_factor, scores_BTE)


@jax.checkpoint
def _of_chosen(scores_BTE: Array, experts_BTK: Array) -> Array:
    """``take_along_axis``, by comparison: the gradient of a gather is a scatter, for which XLA:TPU sorts."""
    return jnp.sum(jnp.where(_chosen(experts_BTK, scores_BTE.shape[-1]), scores_BTE[..., None, :], 0), axis=-1)


def _chosen(experts_BTK: Array, E: int) -> Array:
    """Whether a choice is an expert, [B, T, K, E]; never in memory, as all that is done with it is a sum."""
    return experts_BTK[..., None] == jnp.arange(E)


def loads(routing: Routing, valid_BT: Array) -> Array:
    """How many valid tokens of each sequence go to each expert, [B, E] f32."""
    chosen_BTKE = _chosen(routing.experts_BTK, routing.scores_BTE.shape[-1])
    return jnp.sum(chosen_BTKE & valid_BT[..., None, None], axis=(1, 2), dtype=jnp.float32)


def sequence_balance_loss(routing: Routing, load_BE: Array, valid_BT: Array) -> Array:
    """mean over sequences of sum_i f_i P_i: f_i = E / (K T) * load_i, P_i the mean normalised score of expert i.

    1 when perfectly balanced (DeepSeek-V3, equations 17 to 20, without the weight alpha). T counts valid tokens.
    """
    E, K = routing.scores_BTE.shape[-1], routing.experts_BTK.shape[-1]
    share_BTE = routing.scores_BTE / (jnp.sum(routing.scores_BTE, axis=-1, keepdims=True) + 1e-20)
    n_B = jnp.sum(valid_BT, axis=1, dtype=jnp.float32)
    some_B1 = jnp.maximum(n_B, 1.0)[:, None]
    f_BE = lax.stop_gradient(load_BE) * E / (K * some_B1)
    P_BE = jnp.einsum("BTE,BT->BE", share_BTE, valid_BT.astype(jnp.float32)) / some_B1
    return jnp.sum(f_BE * P_BE) / jnp.maximum(jnp.sum(n_B > 0), 1)


def updated_bias(bias_LE: Array, load_LE: Array, rate: float) -> Array:
    """b_i += rate * (sign(e_i) - mean_j sign(e_j)), e_i = mean load - load_i, per layer.

    Auxiliary-free balancing (DeepSeek-V3, section 2.1.2) in the centred form of Moonlight (arXiv 2502.16982, appendix
    C): the mean of the bias does not drift. Once per optimizer step, with the loads of the whole global batch.
    """
    direction_LE = jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
    return bias_LE + rate * (direction_LE - jnp.mean(direction_LE, axis=-1, keepdims=True))
