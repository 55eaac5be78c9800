"""Experts spread over devices against the loop on one, whatever the routing and the way rows travel."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from kimi_jax import presets
from kimi_jax.layers.experts import EXPERT_PATHS
from kimi_jax.sharding.expert_parallel import expert_parallel
from kimi_jax.sharding.mesh import AXES

B, T, D, F, E, K = 8, 6, 8, 4, 16, 3
MESHES = {
    "expert 8": (1, 1, 8, 1, 1),
    "fsdp 2, expert 4": (1, 2, 4, 1, 1),
    "expert 2, tensor 2, context 2": (1, 1, 2, 2, 2),
}
MESHES |= {"data 2, expert 2, fsdp 2": (2, 2, 2, 1, 1), "data 8": (8, 1, 1, 1, 1)}
CFG = presets.tiny().replace(n_routed_experts=E, num_experts_per_tok=K)


def routing(name: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if name == "random":
        return np.stack([rng.permutation(E)[:K] for _ in range(B * T)]).reshape(B, T, K)
    if name == "balanced":
        return np.arange(B * T * K).reshape(B, T, K) % E
    return np.broadcast_to([E - 1, E - 2, 0], (B, T, K))  # two experts, of one device if it has two or more, take all


@pytest.mark.parametrize("exchange", ["padded", "ring"])
@pytest.mark.parametrize("mesh_name", MESHES)
def test_spread_experts_are_the_loop_on_one_device(mesh_name, exchange):
    mesh = Mesh(np.asarray(jax.devices()).reshape(MESHES[mesh_name]), AXES, axis_types=(AxisType.Auto,) * 5)
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    p = {"gate": draw(E, D, F), "up": draw(E, D, F), "down": draw(E, F, D)}
    x_BTD, weights_BTK, dy_BTD = draw(B, T, D), jnp.abs(draw(B, T, K)), draw(B, T, D)
    spread = expert_parallel(mesh, exchange)

    def looped(p, _, x, weights, experts):
        flat = (a.reshape(-1, a.shape[-1]) for a in (x, weights, experts))
        return EXPERT_PATHS["looped"](p, *flat).reshape(x.shape)

    @partial(jax.jit, static_argnums=0)
    def value_and_gradients(run, experts_BTK):
        y, pullback = jax.vjp(lambda p, x, w: run(p, CFG, x, w, experts_BTK), p, x_BTD, weights_BTK)
        return y, *pullback(dy_BTD)

    for name in ("random", "balanced", "two take all"):
        experts_BTK = jnp.asarray(routing(name), jnp.int32)
        ours, theirs = (jax.device_get(value_and_gradients(run, experts_BTK)) for run in (spread, looped))
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
            assert np.linalg.norm(a - b) <= 2e-6 * np.linalg.norm(b), (name, jax.tree_util.keystr(path))
