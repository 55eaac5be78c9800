"""Newton-Schulz against float64 numpy, one matrix at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.optim import newton_schulz

A, B, C = 3.4445, -4.7750, 2.0315


def reference(m, steps=5):
    """The iteration in float64; the polynomial in its textbook form a X + b (X X^T) X + c (X X^T)^2 X."""
    x = np.asarray(m, np.float64)
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(steps):
        gram = x @ x.T if x.shape[0] <= x.shape[1] else x.T @ x
        x = A * x + (
            B * gram @ x + C * gram @ gram @ x if x.shape[0] <= x.shape[1] else B * x @ gram + C * x @ gram @ gram
        )
    return x


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def relative(got, want):
    want = np.asarray(want, np.float64)
    return np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want)


@pytest.mark.parametrize("dtype, slack", [(jnp.float32, 0.0), (jnp.bfloat16, 0.02)])
def test_singular_values_of_a_gaussian_matrix(dtype, slack):
    x = newton_schulz(jnp.asarray(gaussian(256, 512)), dtype=dtype)
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    assert 0.68 - slack <= s.min() and s.max() <= 1.21 + slack, (s.min(), s.max())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 33), (1, 9), (9, 1)])
def test_equals_the_reference(shape):
    m = gaussian(*shape)
    assert relative(newton_schulz(jnp.asarray(m), dtype=jnp.float32), reference(m)) < 5e-6


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_number_of_steps(steps):
    m = gaussian(12, 20)
    assert relative(newton_schulz(jnp.asarray(m), steps, jnp.float32), reference(m, steps)) < 2e-6


def test_keeps_the_singular_vectors():
    """U V^T of the input, up to the spread of the singular values: U^T X V is diagonal and positive."""
    m = gaussian(16, 48)
    u, _, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    inner = u.T @ np.asarray(newton_schulz(jnp.asarray(m), dtype=jnp.float32), np.float64) @ vt.T
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-5
    assert 0.68 <= np.diag(inner).min() and np.diag(inner).max() <= 1.21


@pytest.mark.parametrize("stacked", [(1,), (7,), (3, 5), (2, 1, 3)])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6)])
def test_a_stack_is_a_loop_over_matrices(stacked, shape):
    stack = gaussian(*stacked, *shape)
    got = np.asarray(newton_schulz(jnp.asarray(stack), dtype=jnp.float32))
    assert got.shape == stack.shape
    for i in np.ndindex(*stacked):
        assert relative(got[i], reference(stack[i])) < 5e-6, i


def test_each_matrix_has_its_own_norm():
    """Scaling one matrix of a stack, by any positive number, changes nothing at all."""
    stack = gaussian(3, 8, 12)
    scaled = stack * np.float32([[[1.0]], [[2.0**10]], [[2.0**-10]]])
    got, want = (np.asarray(newton_schulz(jnp.asarray(s), dtype=jnp.float32)) for s in (scaled, stack))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_tall_is_the_transpose_of_wide(dtype, bound):
    m = jnp.asarray(gaussian(2, 30, 14))
    tall, wide = newton_schulz(m, dtype=dtype), newton_schulz(m.mT, dtype=dtype).mT
    assert relative(tall, wide) < bound


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
@pytest.mark.parametrize("count", [1, 5, 13])
def test_the_cpu_path_and_the_batched_path_agree(dtype, bound, count, monkeypatch):
    """A CPU works through a stack piece by piece, accelerators take it at once."""
    stack = jnp.asarray(gaussian(count, 10, 18))
    by_pieces = newton_schulz(stack, dtype=dtype)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, cpu: default(*args))
    assert relative(by_pieces, newton_schulz(stack, dtype=dtype)) < bound


def test_bfloat16_is_close_to_exact():
    """Eight bits per operand, five steps that each amplify: a few per cent of the norm, no more."""
    m = gaussian(4, 32, 64)
    want = np.stack([reference(x) for x in m])
    error = relative(newton_schulz(jnp.asarray(m)), want)
    assert 1e-4 < error < 3e-2, error  # not exact: the default really computes in bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_stays_zero_and_its_neighbours_finite(dtype):
    stack = gaussian(3, 5, 7)
    stack[1] = 0
    x = np.asarray(newton_schulz(jnp.asarray(stack), dtype=dtype))
    assert np.all(x[1] == 0) and np.isfinite(x).all() and np.abs(x[[0, 2]]).max() > 0.1


def test_dtype_of_the_stack_is_kept():
    for given in (jnp.float32, jnp.bfloat16):
        for computed in (jnp.float32, jnp.bfloat16):
            assert newton_schulz(jnp.ones((2, 3, 4), given), dtype=computed).dtype == given
