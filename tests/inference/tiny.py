"""A model small enough for whole texts, and what it writes by the full forward pass alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax import presets
from kimi_jax.config import ModelConfig
from kimi_jax.dims import Params, map_specs
from kimi_jax.model import KimiK2, specs

CFG = presets.tiny().replace(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dtype="float32", experts="looped",
)  # fmt: skip


@functools.cache
def parameters(cfg: ModelConfig) -> Params:
    rng = np.random.default_rng(0)

    def draw(spec):
        if spec.std is None:
            return jnp.asarray(spec.fill + 0.2 * rng.standard_normal(spec.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(spec.shape) / spec.shape[-2] ** 0.5, jnp.float32)

    return map_specs(draw, specs(cfg))


@partial(jax.jit, static_argnums=1)
def full(params: Params, cfg: ModelConfig, tokens_BT):
    """Logits of the full forward pass."""
    return KimiK2(cfg).apply({"params": params}, tokens_BT)


def greedy(params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
    """``n`` tokens behind every prompt, each the most likely after all before; there are no ties."""
    texts, gaps = greedy_and_gaps(params, cfg, prompts, n)
    assert min(gaps) > 1e-4, "no comparison can be exact"
    return texts


def greedy_and_gaps(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], n: int
) -> tuple[list[list[int]], list[float]]:
    """The texts, and the least difference in each between the logits of the most likely token and the next."""
    length_B, rows_B = np.asarray([len(prompt) for prompt in prompts]), np.arange(len(prompts))
    tokens_BT, gap_B = np.zeros((len(prompts), max(length_B) + n), np.int32), np.full(len(prompts), np.inf)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    for i in range(n):
        logits_BV = np.asarray(full(params, cfg, jnp.asarray(tokens_BT)))[rows_B, length_B + i - 1]
        best = np.sort(logits_BV, axis=-1)
        gap_B = np.minimum(gap_B, best[:, -1] - best[:, -2])
        tokens_BT[rows_B, length_B + i] = logits_BV.argmax(axis=-1)
    return [tokens_BT[b, start : start + n].tolist() for b, start in enumerate(length_B)], gap_B.tolist()
