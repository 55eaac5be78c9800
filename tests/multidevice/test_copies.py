"""Copies of the model, along "data", in a step of several microbatches: on one device the same, and they meet once."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.ahead.collectives import collectives
from kimi_jax.ahead.program import Program
from kimi_jax.sharding import copies
from kimi_jax.training.placement import lowered_step, placement
from kimi_jax.training.step import eval_step, train_step
from tests.multidevice.test_meshes import divisible
from tests.multidevice.test_step import a_batch, assert_same, mild_state

CFG = dataclasses.replace(divisible(data=2, expert=2), accumulation=2)


@pytest.fixture(scope="module")
def place():
    return placement(CFG, jax.devices()[:4])


@pytest.fixture(scope="module")
def compiled(place):
    return lowered_step(CFG, place).compile()


def uneven():
    """One copy has an empty sequence, and all its weights are smaller."""
    batch = a_batch()
    batch.segment_ids[7], batch.weights[7] = 0, 0
    batch.weights[4:] /= 4
    return batch


def test_copies_with_uneven_parts_are_one_device(place, compiled):
    found = compiled(jax.device_put(mild_state(CFG), place.state), jax.device_put(uneven(), place.rows))
    one = jax.jit(partial(train_step, CFG))(mild_state(CFG), uneven())
    assert_same(jax.device_get(found), jax.device_get(one), 1e-5)


def test_the_loss_of_held_out_text(place):
    params, batch = mild_state(CFG).params, uneven()
    found = jax.jit(partial(eval_step, CFG, ops=place.ops))(
        jax.device_put(params, place.state.params), jax.device_put(batch, place.rows)
    )
    np.testing.assert_allclose(found, jax.jit(partial(eval_step, CFG))(params, batch), rtol=1e-6)


def test_what_crosses_copies_is_each_gradient_once(place, compiled):
    """However many microbatches and layers there are; and in pieces as they lie on a device."""
    moved = list(collectives(Program.from_text(compiled.as_text()), dict(place.mesh.shape)))
    across = [c for c in moved if "data" in c.axes]
    params = jax.tree.leaves(jax.eval_shape(lambda: mild_state(CFG).params))
    shards = [s.shard_shape(p.shape) for s, p in zip(jax.tree.leaves(place.state.params), params, strict=True)]
    gradients = 4 * sum(int(np.prod(shape)) for shape in shards)
    assert {c.kind for c in across} == {"all-reduce"} and {c.runs for c in across} == {1.0}
    assert gradients <= sum(c.bytes for c in across) < 1.02 * gradients + 4096  # statistics: 2 bytes cross for each
    assert any("expert" in c.axes and c.runs > 1 for c in moved)  # in the loops, within a copy


def test_gradients_in_bfloat16_are_added_up(place):
    """XLA:CPU aborts on this sum in bf16."""
    rows = jnp.asarray([[1.5, -2.0], [0.25, 256.0]], jnp.bfloat16)
    add_up = partial(copies.run, place.mesh, lambda _, rows, __: copies.total(rows[0]))
    found = jax.jit(add_up)(None, rows, None)
    assert found.dtype == jnp.bfloat16 and found.tolist() == [1.75, 254.0]
