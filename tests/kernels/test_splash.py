"""tokamax's splash kernels, interpreted, against plain attention: outputs, gradients and the largest logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.errors import UserError
from kimi_jax.kernels.splash import splash_attention
from kimi_jax.layers.attention import plain_attention

B, N, T, X, W = 2, 2, 256, 24, 16


def operands():
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.standard_normal((B, N, T, width)), jnp.float32) for width in (X, X, W, W))
    segments = np.ones((B, T), np.int32)
    segments[0, 100:] = 2
    segments[1, 130:] = 0  # padding
    return q, k, v, do, jnp.asarray(segments)


def test_equals_plain_attention():
    q, k, v, do, segments = operands()
    real = (segments > 0)[:, None, :, None]

    def outputs_and_gradients(attention):
        def run(q, k, v):
            o, largest = attention(q, k, v, segments, 0.3)
            return jnp.where(real, o, 0), largest

        (o, largest), pullback = jax.vjp(run, q, k, v)
        return o, largest, *pullback((do, jnp.zeros_like(largest)))

    ours = outputs_and_gradients(lambda *args: splash_attention(*args, interpret=True))
    for a, b in zip(ours, outputs_and_gradients(plain_attention), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def test_a_length_that_no_block_divides_is_refused():
    q, k, v, _, segments = (a[..., :100, :] if a.ndim == 4 else a[:, :100] for a in operands())
    with pytest.raises(UserError, match=r"multiple of 128 .* seq_len \(100\)"):
        splash_attention(q, k, v, segments, 0.3, interpret=True)
