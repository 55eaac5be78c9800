"""Chunked cross-entropy against float64, in value and gradients, at every edge of the chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.training import loss as module
from kimi_jax.training.loss import cross_entropy

B, T, D, V = 2, 7, 6, 11


def inputs():
    """Numbers that bf16 holds exactly; two weights are 0, two negative."""
    rng = np.random.default_rng(0)
    exact = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)  # noqa: E731
    x, head = exact(rng.standard_normal((B, T, D))), exact(rng.standard_normal((D, V)))
    targets, weights = rng.integers(0, V, (B, T)), exact(rng.uniform(0.5, 2, (B, T)))
    weights[0, 3] = weights[1, 6] = 0
    weights[0, 5], weights[1, 1] = -0.5, -1.0
    return x, head, targets, weights


def reference(x, head, targets, weights):
    logits = x @ head
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    hit = np.eye(V)[targets]
    dlogits = weights[..., None] * (probs - hit)
    return -np.sum(weights * np.log((probs * hit).sum(axis=-1))), dlogits @ head.T, np.einsum("btd,btv->dv", x, dlogits)


def run(x, head, targets, weights, dtype=jnp.float32, param_dtype=jnp.float32, scale=3.0):
    arrays = jnp.asarray(x, dtype), jnp.asarray(head, param_dtype)
    rest = jnp.asarray(targets), jnp.asarray(weights, jnp.float32)
    f = lambda x, head: scale * cross_entropy(x, head, *rest)  # noqa: E731
    value, (dx, dhead) = jax.jit(jax.value_and_grad(f, (0, 1)))(*arrays)
    assert dx.dtype == dtype and dhead.dtype == param_dtype and value.dtype == jnp.float32
    alone = jax.jit(cross_entropy)(*arrays, *rest)
    np.testing.assert_allclose(scale * alone, value, rtol=1e-6)
    return (np.asarray(a, np.float64) / scale for a in (value, dx, dhead))


@pytest.mark.parametrize("rows", [1, 3, 5, 7, 14, 1000])  # 14 tokens: in pieces that fit, that do not, and in one
def test_float32(rows, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", rows * V)
    value, dx, dhead = run(*inputs())
    expected_value, expected_dx, expected_dhead = reference(*inputs())
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=2e-6)
    np.testing.assert_allclose(dhead, expected_dhead, atol=5e-6)


def test_no_chunk_is_larger_than_asked(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 5 * V)
    x, _, targets, weights = (jnp.asarray(a) for a in inputs())
    chunks = module._chunked(x, targets, weights, V)
    assert [a.shape[:2] for a in chunks] == [(3, 5)] * 3
    assert float(chunks[2].sum()) == pytest.approx(float(weights.sum()))


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16(param_dtype):
    value, dx, dhead = run(*inputs(), dtype=jnp.bfloat16, param_dtype=param_dtype)
    expected_value, expected_dx, expected_dhead = reference(*inputs())
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)  # exact products, f32 from there
    np.testing.assert_allclose(dx, expected_dx, atol=2**-7 * np.abs(expected_dx).max())
    np.testing.assert_allclose(dhead, expected_dhead, atol=2**-7 * np.abs(expected_dhead).max())


def test_tokens_of_weight_zero_may_be_anything():
    x, head, targets, weights = inputs()
    expected_value, expected_dx, _ = reference(x, head, targets, weights)
    dirty = x.copy()
    dirty[0, 3] = np.inf
    dirty[1, 6] = np.nan
    value, dx, _ = run(dirty, head, targets, weights)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    np.testing.assert_allclose(dx, expected_dx, atol=2e-6)
    assert not dx[0, 3].any() and not dx[1, 6].any()


def test_huge_logits():
    x, head, targets, weights = inputs()
    value, dx, dhead = run(1e4 * x, head, targets, weights)
    logits = 1e4 * x @ head
    largest = logits.max(axis=-1)
    lse = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    picked = np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(value, np.sum(weights * (lse - picked)), rtol=1e-6)
    assert np.isfinite(dx).all() and np.isfinite(dhead).all()
