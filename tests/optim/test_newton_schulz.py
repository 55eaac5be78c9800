"""Newton-Schulz against float64 numpy, one matrix at a time."""

from __future__ import annotations

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.optim import newton_schulz
from tests.optim.reference import error
from tests.optim.reference import newton_schulz as exact


def gaussian(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def exact_stack(stack):
    return np.stack([exact(m) for m in stack.reshape(-1, *stack.shape[-2:])]).reshape(stack.shape)


@pytest.mark.parametrize("dtype, slack", [(jnp.float32, 0.0), (jnp.bfloat16, 0.005)])
def test_singular_values_of_a_gaussian_matrix(dtype, slack):
    x = newton_schulz(jnp.asarray(gaussian(256, 512)), dtype=dtype)
    s = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    assert 0.68 - slack <= s.min() and s.max() <= 1.21 + slack, (s.min(), s.max())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 33), (1, 9), (9, 1), (1, 1)])
def test_equals_the_reference(shape):
    m = gaussian(*shape)
    assert error(newton_schulz(jnp.asarray(m), dtype=jnp.float32), exact(m)) < 5e-6


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_number_of_steps(steps):
    m = gaussian(12, 20)
    assert error(newton_schulz(jnp.asarray(m), steps, jnp.float32), exact(m, steps)) < 2e-6


def test_keeps_the_singular_vectors():
    """U^T X V of the input's U and V is diagonal and positive: only the singular values move."""
    m = gaussian(16, 48)
    u, _, vt = np.linalg.svd(m.astype(np.float64), full_matrices=False)
    inner = u.T @ np.asarray(newton_schulz(jnp.asarray(m), dtype=jnp.float32), np.float64) @ vt.T
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 1e-5
    assert 0.68 <= np.diag(inner).min() and np.diag(inner).max() <= 1.21


@pytest.mark.parametrize("stacked, shape", [((1,), (6, 10)), ((7,), (10, 6)), ((3, 5), (6, 10)), ((2, 1, 3), (10, 6))])
def test_a_stack_is_a_loop_over_matrices(stacked, shape):
    stack = gaussian(*stacked, *shape)
    stack *= np.exp(gaussian(*stacked, 1, 1, seed=1))  # each matrix has a norm of its own
    got = np.asarray(newton_schulz(jnp.asarray(stack), dtype=jnp.float32))
    want = exact_stack(stack)
    assert got.shape == stack.shape
    assert all(error(got[i], want[i]) < 1e-5 for i in np.ndindex(*stacked))


@pytest.mark.parametrize("dtype, bound", [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_tall_is_the_transpose_of_wide(dtype, bound):
    m = jnp.asarray(gaussian(2, 30, 14))
    tall, wide = newton_schulz(m, dtype=dtype), newton_schulz(m.mT, dtype=dtype).mT
    assert error(tall, np.asarray(wide, np.float64)) < bound


@pytest.mark.parametrize("count", [1, 3, 4, 5, 13])
@pytest.mark.parametrize("shape", [(10, 18), (18, 10)])
def test_by_pieces_equals_the_whole(count, shape, monkeypatch):
    """A CPU takes a stack four matrices at a time here, whether or not four divides it."""
    monkeypatch.setattr(importlib.import_module("kimi_jax.optim.newton_schulz"), "PIECE_ELEMENTS", 4 * 180 + 100)
    stack = gaussian(count, *shape)
    got = jax.jit(lambda x: newton_schulz(x, dtype=jnp.float32))(stack)
    assert max(error(g, w) for g, w in zip(got, exact_stack(stack), strict=True)) < 1e-5


def test_a_matrix_larger_than_a_piece(monkeypatch):
    monkeypatch.setattr(importlib.import_module("kimi_jax.optim.newton_schulz"), "PIECE_ELEMENTS", 50)
    stack = gaussian(3, 10, 18)
    assert error(newton_schulz(jnp.asarray(stack), dtype=jnp.float32), exact_stack(stack)) < 5e-6


def test_bfloat16_is_close_to_exact():
    """Eight bits per operand and five steps that each amplify: a few per cent of the norm, no more."""
    m = gaussian(4, 48, 96)
    off = error(newton_schulz(jnp.asarray(m)), exact_stack(m))
    assert 1e-4 < off < 3.5e-2, off  # above zero: the default does compute in bfloat16


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zero_stays_zero_and_its_neighbours_finite(dtype):
    stack = gaussian(3, 5, 7)
    stack[1] = 0
    x = np.asarray(newton_schulz(jnp.asarray(stack), dtype=dtype))
    assert np.all(x[1] == 0) and np.isfinite(x).all() and np.abs(x[[0, 2]]).max() > 0.1


@pytest.mark.parametrize("given", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("computed", [jnp.float32, jnp.bfloat16])
def test_dtype_of_the_stack_is_kept(given, computed):
    found = jax.eval_shape(lambda x: newton_schulz(x, dtype=computed), jax.ShapeDtypeStruct((2, 3, 4), given))
    assert (found.shape, found.dtype) == ((2, 3, 4), given)
