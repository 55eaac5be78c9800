"""Blocked and plain attention against float64, forward and backward, on packed rows with padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.layers.attention import MASKED, attention, masked_softmax, plain_attention

B, N, X, W, SCALE = 2, 3, 10, 7, 0.31


def inputs(T: int, dtype=jnp.float32):
    rng = np.random.default_rng(T)
    q, k, v, do = (rng.standard_normal((B, N, T, width)) for width in (X, X, W, W))
    return tuple(jnp.asarray(a, dtype) for a in (2 * q, k, v, do)), jnp.asarray(packed(T))


def packed(T: int) -> np.ndarray:
    """Row 0 is one document; row 1 holds several, the first of a single token, and ends in padding."""
    row = np.searchsorted([1, T // 5 + 2, T // 2, T - T // 7], np.arange(T), side="right") + 1
    row[T - T // 7 :] = 0
    return np.stack([np.ones(T, np.int32), row.astype(np.int32)])


def reference(q, k, v, do, segments):
    """Values, largest logits and gradients, every pair written out in float64."""
    q, k, v, do = (np.asarray(a, np.float64) for a in (q, k, v, do))
    segments = np.asarray(segments)
    T = segments.shape[1]
    logits = SCALE * q @ k.swapaxes(2, 3)
    allowed = np.zeros((B, 1, T, T), bool)
    for b in range(B):
        for t in range(T):
            for s in range(t + 1):
                allowed[b, 0, t, s] = segments[b, t] == segments[b, s] != 0
    shifted = np.where(allowed, np.exp(logits - np.where(allowed, logits, -np.inf).max(axis=(2, 3), keepdims=True)), 0)
    weights = shifted / np.where(allowed.any(axis=-1, keepdims=True), shifted.sum(axis=-1, keepdims=True), 1)
    dweights = do @ v.swapaxes(2, 3)
    dlogits = SCALE * weights * (dweights - (weights * dweights).sum(axis=-1, keepdims=True))
    max_logits = np.where(allowed, logits, -np.inf).max(axis=(2, 3))
    return weights @ v, max_logits, (dlogits @ k, dlogits.swapaxes(2, 3) @ q, weights.swapaxes(2, 3) @ do)


def run(f, q, k, v, do, segments):
    @jax.jit
    def value_and_gradients(q, k, v):
        (o, max_logits), pullback = jax.vjp(lambda *qkv: f(*qkv, segments, SCALE), q, k, v)
        return o, max_logits, pullback((do, jnp.ones_like(max_logits)))

    return value_and_gradients(q, k, v)


def distance(ours, theirs) -> float:
    ours = np.asarray(ours, np.float64)
    assert np.isfinite(ours).all()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("f", [attention, plain_attention])
@pytest.mark.parametrize("T", [1, 19, 300])
def test_float32(f, T):
    arrays, segments = inputs(T)
    o, max_logits, gradients = run(f, *arrays, segments)
    expected_o, expected_max, expected_gradients = reference(*arrays, segments)
    assert distance(o, expected_o) <= 2e-6
    np.testing.assert_allclose(max_logits, expected_max, rtol=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        if T == 1:
            np.testing.assert_allclose(ours, theirs, atol=1e-6)
        else:
            assert distance(ours, theirs) <= 5e-6


@pytest.mark.parametrize("T", [300, 2100])
def test_many_blocks_equal_all_pairs_at_once(T):
    """2100 tokens are eight blocks, the last of them short."""
    arrays, segments = inputs(T)
    blocked, plain = (run(f, *arrays, segments) for f in (attention, plain_attention))
    for ours, theirs in zip(jax.tree.leaves(blocked), jax.tree.leaves(plain), strict=True):
        assert distance(ours, np.asarray(theirs, np.float64)) <= 1e-5


def test_bfloat16():
    arrays, segments = inputs(300, jnp.bfloat16)
    o, max_logits, gradients = run(attention, *arrays, segments)
    assert o.dtype == jnp.bfloat16 and max_logits.dtype == jnp.float32
    expected_o, expected_max, expected_gradients = reference(*arrays, segments)
    assert distance(o, expected_o) <= 1e-2
    np.testing.assert_allclose(max_logits, expected_max, rtol=1e-5)  # products of bf16 numbers are exact in f32
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.dtype == jnp.bfloat16
        assert distance(ours, theirs) <= 2e-2


@pytest.mark.parametrize("f", [attention, plain_attention])
def test_padding(f):
    """Zeros out, no gradient in, and nothing of its logits in the maximum, however large they are."""
    T = 270
    (q, k, v, do), segments = inputs(T)
    padding = segments[1] == 0
    k = k.at[1].set(jnp.where(padding[:, None], 1e3, k[1]))
    o, max_logits, gradients = run(f, q, k, v, do, segments)
    assert np.isfinite(o).all() and not np.asarray(o[1][:, padding]).any()
    assert float(max_logits[1].max()) < 100
    for gradient in gradients:
        assert np.isfinite(gradient).all() and not np.asarray(gradient[1][:, padding]).any()


@pytest.mark.parametrize("f", [attention, plain_attention])
def test_a_row_of_padding_alone(f):
    (q, k, v, do), segments = inputs(19)
    o, max_logits, gradients = run(f, q, k, v, do, segments.at[1].set(0))
    np.testing.assert_array_equal(o[1], 0)
    np.testing.assert_array_equal(max_logits[1], np.float32(MASKED))
    for gradient in gradients:
        assert not np.asarray(gradient[1]).any()
        assert np.isfinite(gradient).all()


def test_masked_softmax_with_huge_logits():
    logits = jnp.asarray([[[[3e4, 3e4 - 1, 1e30], [-3e4, 5.0, 7.0]]]])
    allowed = jnp.asarray([[[True, True, False], [False, False, False]]])
    weights, largest = masked_softmax(logits, allowed)
    np.testing.assert_allclose(weights[0, 0], [[1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(largest, [[3e4]])
