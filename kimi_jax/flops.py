"""Model FLOPs per token, counted from the declared parameters, and the peak that they are held against."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp

from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, VOCAB, is_spec
from kimi_jax.model import specs

PEAK_BF16 = {  # FLOP/s of one JAX device, by the start of its device_kind (Google Cloud documentation)
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
}


def active_parameters(cfg: ModelConfig) -> int:
    """Weights that one token is multiplied with: the head counts, the embedding look-up and the gains do not."""
    total = 0
    for spec in jax.tree.leaves(specs(cfg), is_leaf=is_spec):
        is_embedding = spec.axes[0] == VOCAB
        if spec.is_vector or is_embedding:
            continue
        share = cfg.num_experts_per_tok / cfg.n_routed_experts if EXPERTS in spec.axes else 1
        total += round(math.prod(spec.shape) * share)
    return total


def forward_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """2 per active weight, and causal attention: 2 (H + R + W) N for each of (seq_len + 1) / 2 keys and each layer."""
    per_key = 2 * (cfg.qk_head_dim + cfg.v_head_dim) * cfg.num_attention_heads
    return 2 * active_parameters(cfg) + cfg.num_hidden_layers * per_key * (seq_len + 1) / 2


def training_flops_per_token(cfg: ModelConfig, seq_len: int) -> float:
    """Three forward passes' worth; recomputation and the optimizer do not count as useful work."""
    return 3 * forward_flops_per_token(cfg, seq_len)


def peak_flops() -> float:
    """FLOP/s of all devices together: the data sheet's on TPU, elsewhere that of a dense product measured here."""
    kind = jax.devices()[0].device_kind
    for name in sorted(PEAK_BF16, key=len, reverse=True):
        if kind.startswith(name):
            return PEAK_BF16[name] * jax.device_count()
    n = 1024
    x = jnp.ones((n, n), jnp.bfloat16)
    square = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    square(x).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        square(x).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)
