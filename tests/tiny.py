"""A model small enough for float64 by hand and for whole texts, and weights that keep its numbers near 1."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from kimi_jax import presets
from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params, map_specs
from kimi_jax.model import specs

CFG = presets.tiny().replace(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dtype="float32",
)  # fmt: skip


def parameters(cfg: ModelConfig, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)

    def draw(spec):
        if spec.std is None:
            return jnp.asarray(spec.fill + 0.2 * rng.standard_normal(spec.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(spec.shape) / spec.shape[-2] ** 0.5, jnp.float32)

    return map_specs(draw, specs(cfg))
