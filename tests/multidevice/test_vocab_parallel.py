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
    hit = np.eye(V)[targets]
    loss = -(weights * np.log((probs * hit).sum(-1))).sum()
    dlogits = weights[..., None] * (probs - hit)
    return loss, dlogits @ head.T, np.einsum("btd,btv->dv", x, dlogits)


@pytest.mark.parametrize("chunk_elements", [2**25, 100])  # the whole vocabulary at once, or in several chunks
@pytest.mark.parametrize("shape", [(8, 1, 1, 1, 1), (1, 2, 4, 1, 1), (1, 1, 2, 2, 2), (2, 2, 1, 2, 1)], ids=str)
def test_loss_and_gradients(shape, chunk_elements, monkeypatch):
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
