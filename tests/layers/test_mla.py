"""Latent attention in both forms against float64, on packed rows with padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.dims import map_specs
from kimi_jax.layers import mla
from kimi_jax.layers.attention import allowed_pairs
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


def both_forms(cfg, p, x):
    pos = mla.Positions(*angles(jnp.asarray(POSITIONS), cfg.rope, cfg.qk_rope_head_dim))
    segments = jnp.asarray(SEGMENTS)

    def naive(p, x):
        return mla.naive(p, cfg, mla.queries(p, cfg, x, pos), mla.latents(p, cfg, x, pos), segments)

    def absorbed(p, x):
        allowed = allowed_pairs(segments, 0, segments.shape[1])
        return mla.absorbed(p, cfg, mla.queries(p, cfg, x, pos), mla.latents(p, cfg, x, pos), allowed)

    return naive, absorbed


@pytest.mark.parametrize("cfg", [CFG, CFG.replace(q_lora_rank=None)], ids=["query latent", "no query latent"])
def test_both_forms_against_float64(cfg):
    p, x = parameters(cfg), np.random.default_rng(1).standard_normal((2, 9, 20))
    expected_y, expected_max = reference(p, cfg, x)
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, x))
    for form in both_forms(cfg, *arrays):
        y, max_logits = jax.jit(form)(*arrays)
        np.testing.assert_allclose(y, expected_y, atol=5e-6 * np.abs(expected_y).max())
        np.testing.assert_allclose(max_logits, expected_max, rtol=1e-5)


def test_both_forms_have_the_same_gradients():
    arrays = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), (parameters(CFG), np.random.default_rng(1).standard_normal((2, 9, 20)))
    )
    dy = jnp.asarray(np.random.default_rng(2).standard_normal((2, 9, 20)), jnp.float32)
    naive, absorbed = (
        jax.jit(jax.grad(lambda p, x, form=form: jnp.sum(dy * form(p, x)[0]), (0, 1)))(*arrays)
        for form in both_forms(CFG, *arrays)
    )
    for ours, theirs in zip(jax.tree.leaves(naive), jax.tree.leaves(absorbed), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * np.abs(theirs).max())
        assert np.abs(theirs).max() > 1e-3


def test_write_stores_each_row_at_its_own_slot():
    cache, new = np.zeros((3, 6, 2), np.float32), np.arange(12, dtype=np.float32).reshape(3, 2, 2) + 1
    expected = cache.copy()
    for b, start in enumerate([0, 3, 4]):
        expected[b, start : start + 2] = new[b]
    np.testing.assert_array_equal(mla.write(jnp.asarray(cache), jnp.asarray(new), jnp.asarray([0, 3, 4])), expected)
