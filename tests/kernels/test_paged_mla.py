"""The decode kernel, interpreted, against its plain twin and float64; with races of its transfers looked for."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from kimi_jax.kernels import paged_mla as kernel

RACES = pltpu.InterpretParams(detect_races=True)


def drawn(last, T, N, page_size, n_pages, dtype=jnp.float32, C=24, R=8):
    rng = np.random.default_rng(0)
    B = len(last)
    pages = 1 + rng.permutation(B * n_pages).reshape(B, n_pages)
    cache = rng.standard_normal((1 + B * n_pages, page_size, C + R))
    cache[0] = np.nan  # no row may read it, nor what others left in its pages past its last position
    for row, position in zip(pages, last, strict=True):
        cache[row[position // page_size], position % page_size + 1 :] = np.nan
        row[position // page_size + 1 :] = 0
    q = rng.standard_normal((B, T * N, C + R))
    pos = np.maximum(np.asarray(last)[:, None] - np.arange(T)[::-1], 0)
    return jnp.asarray(q, dtype), jnp.asarray(cache, dtype), jnp.asarray(pages), jnp.asarray(pos)


def float64(q, cache, pages, pos, C, scale):
    q, cache = (np.asarray(a, np.float64) for a in (q, cache))
    o = np.empty((*q.shape[:2], C))
    for b, z in np.ndindex(q.shape[:2]):
        kv = cache[pages[b]].reshape(-1, q.shape[-1])[: pos[b, z * pos.shape[1] // q.shape[1]] + 1]
        logits = scale * kv @ q[b, z]
        weights = np.exp(logits - logits.max())
        o[b, z] = weights @ kv[:, :C] / weights.sum()
    return o


@pytest.mark.parametrize(
    "last, T, N, page_size, n_pages",
    [
        ((21, 0, 9, 31), 1, 2, 8, 4),  # several blocks, rows of one token, an even number of rows
        ((5, 20, 16), 3, 2, 8, 3),  # drafts, an odd number of rows
        ((15, 16), 1, 2, 16, 2),  # up to a page's last slot, and one past it
        ((40,), 2, 2, 32, 2),  # a page is larger than a block
    ],
)
def test_the_kernel_equals_float64_without_races(last, T, N, page_size, n_pages, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 16)
    inputs, how = drawn(last, T, N, page_size, n_pages), {"C": 24, "scale": 0.3}
    expected = float64(*inputs, **how)
    found = kernel.paged_mla(*inputs, **how, interpret=RACES)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert not races_found()
    q, cache, pages, pos = inputs
    plain = kernel.paged_mla_plain(q, jnp.nan_to_num(cache), pages, pos, **how)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=1e-5)


def races_found() -> bool:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    return interpret_pallas_call.races.races_found
