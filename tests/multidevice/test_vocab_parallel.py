"""The loss with a split head against float64 on the whole of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kimi_jax.sharding import vocab_parallel as module
from kimi_jax.sharding.mesh import AXES

B, T, D, V = 8, 6, 8, 44


def reference(x, head, targets, weights):
    """The loss and its gradients in float64."""
    logits = x @ head
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs /= probs.sum(-1, keepdims=True)
    hit = np.eye(head.shape[1])[targets]
    loss = -(weights * np.log((probs * hit).sum(-1))).sum()
    dlogits = weights[..., None] * (probs - hit)
    return loss, dlogits @ head.T, np.einsum("btd,btv->dv", x, dlogits)


SHAPES = [(8, 1, 1, 1, 1), (1, 2, 4, 1, 1), (1, 1, 2, 2, 2), (2, 2, 1, 2, 1)]
WHOLE_AND_IN_CHUNKS = [(shape, V, elements) for elements in (2**25, 100) for shape in SHAPES]
ODD = [
    ((1, 2, 4, 1, 1), 43, 100),
    ((1, 1, 2, 2, 2), 46, 100),
    ((2, 2, 1, 2, 1), 62, 120),
]  # with a last chunk of 11, 7, 1


@pytest.mark.parametrize("shape, V, chunk_elements", WHOLE_AND_IN_CHUNKS + ODD, ids=str)
def test_loss_and_gradients(shape, V, chunk_elements, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", chunk_elements)
    rng = np.random.default_rng(0)
    x, head = 3 * rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    targets, weights = rng.integers(0, V, (B, T)), rng.uniform(0.5, 2, (B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    mesh = Mesh(np.asarray(jax.devices()).reshape(shape), AXES, axis_types=(AxisType.Auto,) * 5)
    loss = module.vocab_parallel(mesh)
    args = [jnp.asarray(a, jnp.float32) for a in (x, head)] + [jnp.asarray(targets), jnp.asarray(weights, jnp.float32)]
    scaled = jax.jit(lambda *a: jax.value_and_grad(lambda *a: 2 * loss(*a), argnums=(0, 1))(*a))
    ours, (dx, dhead) = scaled(*args)
    expected = reference(x, head, targets, weights)
    for found, wanted in zip((ours, dx, dhead), expected, strict=True):
        np.testing.assert_allclose(found, 2 * wanted, rtol=2e-5, atol=2e-6 * np.abs(wanted).max())
    np.testing.assert_allclose(jax.jit(loss)(*args), expected[0], rtol=1e-6)


@pytest.mark.parametrize(
    "tokens, V, width",
    [
        (4096, 163_840, 8192),
        (8192, 163_840 // 8, 4096),
        (3000, 163_840, 10_240),  # of 11,184 that fit
        (4096, 151_643, 8192),  # a prime number of words
        (4096, 32_003, 8192),
        (1, 61, 61),
        (2**26, 61, 1),
    ],
)
def test_width_of_a_chunk(tokens, V, width):
    assert module._width(tokens, V) == width
