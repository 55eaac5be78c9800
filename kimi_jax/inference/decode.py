"""Cached decoding on one device: absorbed attention over a contiguous latent cache.

``extend`` feeds any number of tokens per sequence, so that one function is prefill (a prompt) and decode (one token).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kimi_jax.config import ModelConfig
from kimi_jax.dims import Array, Params
from kimi_jax.layers import block
from kimi_jax.layers.experts import fastest_experts_of
from kimi_jax.layers.mla import Cache
from kimi_jax.layers.norm import rms_norm
from kimi_jax.model import embed, head, positions


class State(NamedTuple):
    """The latent cache of every layer, and how many tokens of each sequence are in it."""

    cache: Cache
    length_B: Array


def init_state(cfg: ModelConfig, batch: int, capacity: int) -> State:
    """An empty cache with room for ``capacity`` tokens per sequence."""
    shape = (cfg.num_hidden_layers, batch, capacity)
    latent_LBSC = jnp.zeros((*shape, cfg.kv_lora_rank), cfg.dtype)
    k_rope_LBSR = jnp.zeros((*shape, cfg.qk_rope_head_dim), cfg.dtype)
    return State(Cache(latent_LBSC, k_rope_LBSR), jnp.zeros(batch, jnp.int32))


def extend(params: Params, cfg: ModelConfig, state: State, tokens_BT: Array, count_B: Array) -> tuple[Array, State]:
    """Appends the first ``count`` tokens of every row; returns f32 logits after the last of them, [B, V].

    Rows shorter than T are padded on the right; what padding writes, later tokens overwrite before anything reads it.
    """
    slots_BT = state.length_B[:, None] + jnp.arange(tokens_BT.shape[1])
    capacity = state.cache.latent_LBSC.shape[2]
    allowed_BTS = jnp.arange(capacity) <= slots_BT[..., None]
    pos = positions(cfg, slots_BT)
    x_BTD = embed(params, cfg, tokens_BT)
    k = cfg.first_k_dense_replace
    parts = []
    for name, layers in (("dense_layers", slice(0, k)), ("moe_layers", slice(k, None))):
        if name not in params:
            continue
        cache = jax.tree.map(lambda a, layers=layers: a[layers], state.cache)
        x_BTD, cache = _run_stack(params[name], cfg, x_BTD, pos, cache, state.length_B, allowed_BTS)
        parts.append(cache)
    cache = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    last_B1D = jnp.take_along_axis(x_BTD, jnp.maximum(count_B - 1, 0)[:, None, None], axis=1)
    logits_B1V = head(params, rms_norm(last_B1D, params["norm"], cfg.rms_norm_eps))
    return logits_B1V[:, 0], State(cache, state.length_B + count_B)


def _run_stack(p: Params, cfg: ModelConfig, x_BTD: Array, pos, cache: Cache, start_B: Array, allowed_BTS: Array):
    """One scan over the layers of a stack; routed experts are read in place rather than sliced out layer by layer."""
    moe = p.get("moe")
    stack = moe["experts"] if moe else None
    sliced = {**p, "moe": {**moe, "experts": None}} if moe else p

    def step(x_BTD: Array, layer):
        index, layer_params, layer_cache = layer
        x_BTD, layer_cache = block.attend_cached(layer_params, cfg, x_BTD, pos, layer_cache, start_B, allowed_BTS)

        def experts(_, cfg, x_BTD, weights_BTK, experts_BTK):
            rows = (a.reshape(-1, a.shape[-1]) for a in (x_BTD, weights_BTK, experts_BTK))
            return fastest_experts_of(stack, index, *rows).reshape(x_BTD.shape)

        x_BTD, _ = block.feed_forward(layer_params, cfg, x_BTD, experts)
        return x_BTD, layer_cache

    n_layers = p["attn_norm"].shape[0]
    return lax.scan(step, x_BTD, (jnp.arange(n_layers), sliced, cache))


@partial(jax.jit, static_argnums=(1,), donate_argnums=(2,))
def _extend(params: Params, cfg: ModelConfig, state: State, tokens_BT: Array, count_B: Array):
    return extend(params, cfg, state, tokens_BT, count_B)


@partial(jax.jit, static_argnums=(1, 4), donate_argnums=(2,))
def _step(params: Params, cfg: ModelConfig, state: State, token_B: Array, temperature: float, key: Array):
    logits_BV, state = extend(params, cfg, state, token_B[:, None], jnp.ones_like(token_B))
    return sample(logits_BV, temperature, key), state


def sample(logits_BV: Array, temperature: float, key: Array) -> Array:
    """The most likely token at temperature 0, else a draw from softmax(logits / temperature)."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return jax.random.categorical(key, logits_BV / temperature).astype(jnp.int32)


def generate(
    params: Params, cfg: ModelConfig, prompts: Sequence[Sequence[int]], *, new_tokens: int, temperature=0.0, seed=0
) -> Iterator[np.ndarray]:
    """Yields ``new_tokens`` arrays [B], the next token of every prompt; the caller may stop earlier.

    ``params`` as from ``model.in_compute_dtype``.
    """
    longest = max(len(prompt) for prompt in prompts)
    assert min(len(prompt) for prompt in prompts) > 0
    padded = -(-longest // 32) * 32
    tokens_BT = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(tokens_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    state = init_state(cfg, len(prompts), padded + new_tokens)
    count_B = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    logits_BV, state = _extend(params, cfg, state, jnp.asarray(tokens_BT), count_B)
    key = jax.random.key(seed)
    token_B = sample(logits_BV, temperature, key)
    for i in range(new_tokens):
        yield np.asarray(token_B)
        if i + 1 < new_tokens:
            token_B, state = _step(params, cfg, state, token_B, temperature, jax.random.fold_in(key, i + 1))
