"""Named model shapes: the released ones, and small ones in their proportions."""

from __future__ import annotations

import functools

import numpy as np

from kimi_jax.config import ModelConfig, RopeConfig
from kimi_jax.errors import UserError


@functools.cache
def gate_scale(n_experts: int, k: int, draws: int = 20_000) -> float:
    """The routed scaling factor that keeps the routed sum at the size of one expert's output.

    Draw Gaussian router logits, take the sigmoid, keep the top ``k``, normalise to p; the factor is the mean of
    1 / sqrt(sum p^2). Gives 2.827 for (384, 8) and 2.446 for (64, 6), the released values (Moonlight,
    arXiv 2502.16982, figure 6). Two decimals are meaningful with this many draws.
    """
    scores = 1 / (1 + np.exp(-np.random.default_rng(0).standard_normal((draws, n_experts))))
    top = np.sort(scores, axis=-1)[:, -k:]
    p = top / top.sum(axis=-1, keepdims=True)
    return round(float(np.mean(1 / np.sqrt((p**2).sum(axis=-1)))), 3)


YARN_K2 = RopeConfig(theta=50_000.0, factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)


def kimi_k2_1t() -> ModelConfig:
    """Kimi-K2-Instruct / -Base as released: 1.04 T parameters, 32.6 B active."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=7168,
        intermediate_size=18_432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=64,
        n_routed_experts=384,
        num_experts_per_tok=8,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        routed_scaling_factor=2.827,
        max_position_embeddings=131_072,
        rope=YARN_K2,
        remat="full",
    )


def moonlight_16b() -> ModelConfig:
    """Moonlight-16B-A3B (arXiv 2502.16982): the smaller sibling, without a query latent."""
    return ModelConfig(
        vocab_size=163_840,
        hidden_size=2048,
        intermediate_size=11_264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        n_routed_experts=64,
        num_experts_per_tok=6,
        n_shared_experts=2,
        q_lora_rank=None,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        rope=RopeConfig(theta=50_000.0),
        remat="full",
    )


def mid_196m() -> ModelConfig:
    """A K2-shaped model that one CPU can train; the shape of the speed comparison."""
    return ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1024,
        moe_intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=8,
        n_routed_experts=64,
        num_experts_per_tok=8,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        routed_scaling_factor=gate_scale(64, 8),
        max_position_embeddings=131_072,
        rope=YARN_K2,
    )


def tiny() -> ModelConfig:
    """For tests and the demo: every part of Kimi-K2, nothing a multiple of 128 but the byte vocabulary's room."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        n_routed_experts=16,
        num_experts_per_tok=4,
        q_lora_rank=64,
        kv_lora_rank=48,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        routed_scaling_factor=gate_scale(16, 4),
        max_position_embeddings=131_072,
        rope=YARN_K2,
    )


PRESETS = {f.__name__: f for f in (kimi_k2_1t, moonlight_16b, mid_196m, tiny)}


def get(name: str) -> ModelConfig:
    """The preset of that name; ``UserError`` with the list of names otherwise."""
    if not isinstance(name, str) or name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()
