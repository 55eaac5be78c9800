"""SwiGLU against float64, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kimi_jax.layers.mlp import mlp, swiglu


def test_forward_and_backward():
    rng = np.random.default_rng(0)
    shapes = dict(x=(2, 5, 6), gate=(6, 9), up=(6, 9), down=(9, 6), dy=(2, 5, 6))
    a = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    gate, up = a["x"] @ a["gate"], a["x"] @ a["up"]
    sigmoid = 1 / (1 + np.exp(-gate))
    h = gate * sigmoid * up
    dh = a["dy"] @ a["down"].T
    dgate, dup = dh * up * sigmoid * (1 + gate * (1 - sigmoid)), dh * gate * sigmoid
    outer = lambda x, y: np.einsum("btx,bty->xy", x, y)  # noqa: E731
    expected = (
        h @ a["down"],
        {"down": outer(h, a["dy"]), "gate": outer(a["x"], dgate), "up": outer(a["x"], dup)},
        dgate @ a["gate"].T + dup @ a["up"].T,
    )

    x, *weights, dy = (jnp.asarray(value, jnp.float32) for value in a.values())
    y, pullback = jax.vjp(mlp, dict(zip(("gate", "up", "down"), weights, strict=True)), x)
    for ours, theirs in zip(jax.tree.leaves((y, *pullback(dy))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_swiglu_is_computed_in_float32():
    gate, up = (jnp.asarray(np.random.default_rng(i).standard_normal(1000), jnp.bfloat16) for i in range(2))
    g, u = np.asarray(gate, np.float64), np.asarray(up, np.float64)
    ours = jax.jit(swiglu)(gate, up)
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float64), g / (1 + np.exp(-g)) * u, rtol=2**-8)
