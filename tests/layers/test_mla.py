"""Latent attention against float64, on packed rows with padding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.dims import map_specs
from kimi_jax.layers import mla
from kimi_jax.layers.rope import angles, frequencies

CFG = presets.tiny().replace(
    hidden_size=20, num_attention_heads=3, q_lora_rank=14, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4,
    v_head_dim=5, dtype="float32", rms_norm_eps=0.5,
)  # fmt: skip
POSITIONS = np.stack([np.arange(9) + 1000, [0, 1, 2, 0, 1, 2, 3, 4, 0]])
SEGMENTS = np.asarray([[1] * 9, [1, 1, 1, 2, 2, 2, 2, 2, 0]])


def parameters(cfg):
    rng = np.random.default_rng(0)
    p = map_specs(lambda spec: rng.standard_normal(spec.shape) * spec.shape[0] ** -0.5, mla.specs(cfg))
    return p | {name: rng.uniform(0.5, 1.5, p[name].shape) for name in ("q_norm", "kv_norm") if name in p}


def reference(p, cfg, x):
    """y and the largest logits, one head and one query at a time in float64, rotating pairs in place."""
    H, C, N = cfg.qk_nope_head_dim, cfg.kv_lora_rank, cfg.num_attention_heads

    def norm(a, gain):
        return gain * a / np.sqrt(np.mean(a**2, axis=-1, keepdims=True) + 1e-6)

    def rotate(a):
        f = frequencies(cfg.rope, cfg.qk_rope_head_dim).astype(np.float64)
        turned = (a[..., 0::2] + 1j * a[..., 1::2]) * np.exp(1j * POSITIONS[..., None] * f)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(a.shape)

    latent = norm((x @ p["kv_a"])[..., :C], p["kv_norm"])
    key_rope = rotate((x @ p["kv_a"])[..., C:])
    y, max_logits = np.zeros_like(x), np.full((len(x), N), -np.inf)
    for n in range(N):
        q = x @ p["q"][:, n] if "q" in p else norm(x @ p["q_a"], p["q_norm"]) @ p["q_b"][:, n]
        key = np.concatenate([latent @ p["kv_b"][:, n, :H], key_rope], axis=-1)
        query, value = np.concatenate([q[..., :H], rotate(q[..., H:])], axis=-1), latent @ p["kv_b"][:, n, H:]
        for b, t in np.ndindex(SEGMENTS.shape):
            seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t] != 0]
            if not seen:
                continue
            scale = (cfg.qk_nope_head_dim + cfg.qk_rope_head_dim) ** -0.5 * (0.1 * np.log(32) + 1) ** 2
            logits = scale * key[b, seen] @ query[b, t]
            max_logits[b, n] = max(max_logits[b, n], logits.max())
            weights = np.exp(logits - logits.max())
            y[b, t] += weights @ value[b, seen] / weights.sum() @ p["o"][n]
    return y, max_logits


def naive(cfg, p, x):
    pos = mla.Positions(*angles(jnp.asarray(POSITIONS), cfg.rope, cfg.qk_rope_head_dim))
    return mla.naive(p, cfg, mla.queries(p, cfg, x, pos), mla.latents(p, cfg, x, pos), jnp.asarray(SEGMENTS))


@pytest.mark.parametrize("cfg", [CFG, CFG.replace(q_lora_rank=None)], ids=["query latent", "no query latent"])
def test_against_float64(cfg):
    p, x = parameters(cfg), np.random.default_rng(1).standard_normal((2, 9, 20))
    expected_y, expected_max = reference(p, cfg, x)
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    y, max_logits = jax.jit(partial(naive, cfg))(*arrays)
    np.testing.assert_allclose(y, expected_y, atol=5e-6 * np.abs(expected_y).max())
    np.testing.assert_allclose(max_logits, expected_max, rtol=1e-5)


def test_gradients_are_the_slopes_in_float64():
    """Along one random direction of all weights and inputs at a time."""
    rng = np.random.default_rng(2)
    p, x = parameters(CFG), np.random.default_rng(1).standard_normal((2, 9, 20))
    dy = rng.standard_normal((2, 9, 20))

    def loss(t: float, move) -> float:
        moved_p, moved_x = jax.tree.map(lambda a, d: a + t * d, (p, x), move)
        return np.sum(dy * reference(moved_p, CFG, moved_x)[0])

    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x, dy))
    found = jax.jit(jax.grad(lambda p, x, dy: jnp.sum(dy * naive(CFG, p, x)[0]), (0, 1)))(*arrays)
    for _ in range(3):
        move = jax.tree.map(lambda a: rng.standard_normal(a.shape), (p, x))
        slope = (loss(1e-5, move) - loss(-1e-5, move)) / 2e-5
        ours = jax.tree.map(lambda g, d: np.sum(np.asarray(g, np.float64) * d), found, move)
        np.testing.assert_allclose(sum(jax.tree.leaves(ours)), slope, rtol=1e-4)
