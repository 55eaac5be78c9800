"""Attention over split sequences and heads is plain attention on one device: outputs, gradients, largest logits."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kimi_jax import presets
from kimi_jax.layers.attention import attention, plain_attention
from kimi_jax.layers.mla import attend_expanded
from kimi_jax.sharding.mesh import AXES
from kimi_jax.sharding.parallel_attention import parallel_attention

B, T, N = 4, 16, 6
CFG = presets.tiny().replace(num_attention_heads=N, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=3)
C = 8
MESHES = {
    "context 8, more devices than heads": (1, 1, 1, 1, 8),
    "context 4, heads do not divide": (1, 2, 1, 1, 4),
    "context 2, tensor 2": (1, 1, 2, 2, 2),
    "context 2, fsdp 4": (1, 4, 1, 1, 2),
    "no context": (2, 2, 1, 2, 1),
}


@pytest.mark.parametrize("name", MESHES)
def test_equals_plain_attention(name):
    mesh = Mesh(np.asarray(jax.devices()).reshape(MESHES[name]), AXES, axis_types=(AxisType.Auto,) * 5)
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    operands = draw(C, N, 7), draw(B, T, N, 6), draw(B, T, C), draw(B, T, 2)
    do_BTNW = draw(B, T, N, 3)
    segments = np.ones((B, T), np.int32)
    segments[0, 5:], segments[1, 11:], segments[2] = 2, 0, np.repeat(np.arange(1, 5), 4)

    @partial(jax.jit, static_argnums=0)
    def everything(attend):
        def run(kv_b, *operands):
            return attend(kv_b, CFG, *operands, jnp.asarray(segments))

        (o, largest), pullback = jax.vjp(run, *operands)
        return o, largest, *pullback((do_BTNW, jnp.zeros_like(largest)))

    ours = everything(parallel_attention(mesh, attention))
    for a, b in zip(ours, everything(partial(attend_expanded, plain_attention)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
