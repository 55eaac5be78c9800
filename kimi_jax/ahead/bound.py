"""The least time that a step of serving can take on a slice: of its bytes through HBM, or of its products.

    chosen(M) = E (1 - (1 - K/E)^M)      experts that M tokens choose in a layer, if all are equally likely
    bytes     = 8 bits for every weight that some token is multiplied with, and the latents of every request's past
    seconds   = max(bytes / bandwidth, FLOPs / peak)      of all devices together, the links for nothing

Weights count once a step, whatever their number of bits on the device, and so does the cache in its own dtype.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

from kimi_jax.ahead.hardware import CHIPS, of_kind
from kimi_jax.config import ModelConfig
from kimi_jax.dims import EXPERTS, is_spec
from kimi_jax.flops import PEAK_BF16, active_parameters
from kimi_jax.model import specs


@dataclass(frozen=True)
class Bound:
    bytes: float  # of all devices
    seconds: float
    tokens_per_s: float


def chosen_experts(cfg: ModelConfig, tokens: int) -> float:
    E, K = cfg.n_routed_experts, cfg.num_experts_per_tok
    return E * (1 - (1 - K / E) ** tokens)


def expert_parameters(cfg: ModelConfig) -> int:
    """Of all routed experts."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs(cfg), is_leaf=is_spec) if EXPERTS in s.axes)


def bound(cfg: ModelConfig, rows: int, width: int, past: int, cache_bytes: int, kind: str, devices: int) -> Bound:
    """Of ``rows`` requests with ``width`` new tokens each after ``past``, on ``devices`` of a kind."""
    C, R, N = cfg.kv_lora_rank, cfg.qk_rope_head_dim, cfg.num_attention_heads
    tokens, experts = rows * width, expert_parameters(cfg)
    per_token = active_parameters(cfg)
    others = per_token - experts * cfg.num_experts_per_tok / max(cfg.n_routed_experts, 1)
    read = others + experts * chosen_experts(cfg, tokens) / max(cfg.n_routed_experts, 1)
    read += rows * past * cfg.num_hidden_layers * (C + R) * cache_bytes
    products = 2 * per_token * tokens + tokens * past * cfg.num_hidden_layers * 2 * N * (2 * C + R)
    bandwidth, peak = of_kind(CHIPS, kind).hbm_bytes_per_s, of_kind(PEAK_BF16, kind)
    seconds = max(read / bandwidth, products / peak) / devices
    return Bound(read, seconds, tokens / seconds)
