"""Attention over pages, in both forms, against float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.inference import attention
from kimi_jax.layers import mla

CFG = presets.tiny().replace(
    hidden_size=7, num_attention_heads=3, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5,
    dtype="float32",
)  # fmt: skip


def parameters():
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(mla.specs(CFG)[name].shape) * 0.5 for name in ("kv_b", "o")}


def drawn(start, T, page_size, n_pages):
    """Queries, a cache of random numbers, NaN where no row of these has been, and page tables in no order."""
    rng = np.random.default_rng(1)
    B, N, H, R, C = len(start), 3, 4, 2, 6
    q = rng.standard_normal((B, T, N, H)), rng.standard_normal((B, T, N, R))
    pages = 1 + rng.permutation(B * n_pages).reshape(B, n_pages)
    held = rng.standard_normal((2, 1 + B * n_pages, page_size, C + R + 3))
    held[..., C + R :] = 0  # rows may be padded
    pos = np.asarray(start)[:, None] + np.arange(T)
    held[:, 0] = np.nan
    for row, last in zip(pages, pos[:, -1], strict=True):
        held[:, row[last // page_size], last % page_size + 1 :] = np.nan
        held[:, row[last // page_size + 1 :]] = np.nan
    return q, held, pages, pos


def reference(p, q, held, pages, pos):
    H, C = CFG.qk_nope_head_dim, CFG.kv_lora_rank
    scale = (4 + 2) ** -0.5 * (0.1 * np.log(32) + 1) ** 2
    y = np.zeros((*pos.shape, CFG.hidden_size))
    for b, t in np.ndindex(pos.shape):
        kv = held[pages[b]].reshape(-1, held.shape[-1])[: pos[b, t] + 1]
        for n in range(CFG.num_attention_heads):
            expanded = kv[:, :C] @ p["kv_b"][:, n]
            logits = scale * (expanded[:, :H] @ q[0][b, t, n] + kv[:, C : C + 2] @ q[1][b, t, n])
            weights = np.exp(logits - logits.max())
            y[b, t] += weights @ expanded[:, H:] / weights.sum() @ p["o"][n]
    return y


@pytest.mark.parametrize("form", [attention.absorbed, attention.naive])
@pytest.mark.parametrize(
    "start, T, page_size, n_pages", [((0, 3, 29), 6, 4, 9), ((17, 0), 1, 16, 3), ((5, 0), 8, 1, 40)]
)
def test_both_forms_equal_float64(form, start, T, page_size, n_pages, monkeypatch):
    """Many blocks, a last one that is not whole, and queries in groups."""
    monkeypatch.setattr(attention, "BLOCK", 8)
    monkeypatch.setattr(attention, "LARGEST", 3 * len(start) * T // 2 * 8)
    p, (q, held, pages, pos) = parameters(), drawn(start, T, page_size, n_pages)
    f32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, q, held))
    found = jax.jit(form, static_argnums=1)(f32[0], CFG, f32[1], f32[2], jnp.asarray(1), pages, pos)
    expected = reference(p, q, held[1], pages, pos)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("form", [attention.absorbed, attention.naive])
def test_a_row_of_131072_positions_beside_a_short_one(form):
    p, (q, held, pages, pos) = parameters(), drawn((131_070, 2), 2, 512, 256)
    f32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (p, q, held))
    found = jax.jit(form, static_argnums=1)(f32[0], CFG, f32[1], f32[2], jnp.asarray(0), pages, pos)
    expected = reference(p, q, held[0], pages, pos)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_the_form_with_fewer_operations():
    """Kimi-K2: 2 (512 + 64 + 512) operations per pair against 2 (128 + 64 + 128), and 2 * 512 * 256 per token."""
    cfg = presets.kimi_k2_1t()
    assert not attention.prefers_naive(cfg, 170)
    assert attention.prefers_naive(cfg, 171)
