"""The update of a stack of experts, compiled for a TPU: no second copy of weights, momentum or gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax
from jax.sharding import NamedSharding

from kimi_jax.ahead.topology import topology_devices
from kimi_jax.dims import ParamSpec
from kimi_jax.optim import muon_clip
from kimi_jax.sharding.mesh import MeshConfig, make_mesh
from kimi_jax.sharding.parallel_newton_schulz import parallel_orthogonalised
from kimi_jax.sharding.rules import TRAIN, partition

AXES = ("layers", "experts", "embed", "expert_mlp")


@pytest.mark.parametrize("sides", [(1024, 512), (512, 1024)])
def test_an_update_takes_the_place_of_the_gradients(sides):
    """Three stacks live through it, weights, momentum and gradients or steps; beside them temporaries of a piece."""
    mesh = make_mesh(MeshConfig(fsdp=2, expert=2), topology_devices("v6e:2x2"))
    shape = (32, 8, *sides)
    place = NamedSharding(mesh, partition(ParamSpec(shape, AXES), mesh, TRAIN))
    optimizer = muon_clip(0.1, axes=AXES, orthogonalise=parallel_orthogonalised(mesh))

    def step(params, state, x):
        def updated(grads):
            updates, new = optimizer.update(grads, state, params)
            return optax.apply_updates(params, updates), new

        grads = jax.grad(lambda params: jnp.sum(jnp.sin(params) * x))(params)
        finite = jnp.isfinite(jnp.sum(grads, dtype=jnp.float32))
        return lax.cond(finite, updated, lambda grads: (params, state), grads)

    weights = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=place)
    like = jax.eval_shape(optimizer.init, weights)
    state = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place if a.ndim else None), like)
    x = jax.ShapeDtypeStruct((), jnp.bfloat16)
    memory = jax.jit(step, donate_argnums=(0, 1)).lower(weights, state, x).compile().memory_analysis()
    assert memory is not None
    stack = 2 * 32 * 8 * 1024 * 512 / mesh.size
    assert memory.alias_size_in_bytes >= 2 * stack
    assert 3 * stack < memory.peak_memory_in_bytes < 4.5 * stack, memory.peak_memory_in_bytes / stack
