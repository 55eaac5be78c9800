"""A training step on every axis of the mesh, alone and in pairs, against the same step on one device."""

from __future__ import annotations

import dataclasses
import itertools
import math
from functools import partial

import jax
import pytest

from kimi_jax.sharding.mesh import AXES, MeshConfig
from kimi_jax.training.placement import lowered_step, placement
from kimi_jax.training.step import train_step
from tests.multidevice.test_step import a_batch, assert_same, config, mild_state

MESHES = [{"context": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}]  # "data" and "expert" together: test_copies
SLOW = [{axis: 2} for axis in AXES if axis != "context"] + [{"expert": 8}, {"fsdp": 2, "expert": 4}]
SLOW += [dict.fromkeys(pair, 2) for pair in itertools.combinations(AXES, 2)]
MESHES += [pytest.param(sizes, marks=pytest.mark.slow) for sizes in SLOW]


def divisible(**sizes: int):
    """The small model with sizes that all these meshes divide."""
    cfg = config("float32")
    model = cfg.model.replace(vocab_size=64, n_routed_experts=8, q_lora_rank=16)
    return dataclasses.replace(cfg, model=model, mesh=MeshConfig(**sizes))


@pytest.fixture(scope="module")
def on_one():
    cfg = divisible()
    return jax.device_get(jax.jit(partial(train_step, cfg))(mild_state(cfg), a_batch()))


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_a_step_on_any_mesh_is_a_step_on_one_device(sizes, on_one):
    cfg = divisible(**{"data": 1, **sizes})
    place = placement(cfg, jax.devices()[: math.prod(sizes.values())])
    state, batch = jax.device_put(mild_state(cfg), place.state), jax.device_put(a_batch(), place.rows)
    found_state, found = jax.device_get(lowered_step(cfg, place).compile()(state, batch))
    one_state, one = on_one
    assert_same((found_state, found), (one_state, one), 1e-5)
