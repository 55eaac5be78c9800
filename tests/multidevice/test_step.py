"""One training step on eight devices, the batch split over them, against the same step on one."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.data.packing import Batch
from kimi_jax.dims import is_spec
from kimi_jax.model import specs
from kimi_jax.sharding.mesh import MeshConfig
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kimi_jax.training.placement import placement
from kimi_jax.training.step import ON_ONE_DEVICE, TrainState, batch_sums, optimizer, train_step
from tests import tiny


def config(dtype: str) -> TrainConfig:
    opt = OptimizerConfig(learning_rate=1e-2, ns_dtype="float32", ns_steps=1)
    schedule = ScheduleConfig(warmup_steps=0)
    return TrainConfig(tiny.CFG.replace(dtype=dtype), optimizer=opt, schedule=schedule, batch_size=8, seq_len=16)


def a_state(cfg: TrainConfig, seed: int = 0) -> TrainState:
    params = tiny.parameters(cfg.model, seed)
    opt_state = optimizer(cfg).init(params)
    # Adam's first step is g / (|g| + eps): it would turn the rounding of a gradient near 0 into a step of its own.
    second = jax.tree.map(lambda v: jnp.full_like(v, 1e-6), opt_state.second)
    return TrainState(jnp.asarray(10, jnp.int32), params, opt_state._replace(count=jnp.asarray(10), second=second))


def mild_state(cfg: TrainConfig, seed: int = 0) -> TrainState:
    """Weights of half the size: attention is not so sharp that it multiplies the rounding of its numbers."""
    state = a_state(cfg, seed)
    halved = jax.tree.map(
        lambda spec, w: w if spec.std is None else w / 2, specs(cfg.model), state.params, is_leaf=is_spec
    )
    return state._replace(params=halved)


def a_batch() -> Batch:
    """Rows of two documents, uneven weights, and padding in some rows only, so that devices differ."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 61, (2, 8, 16))
    segments, positions = np.tile([1] * 7 + [2] * 9, (8, 1)), np.tile([*range(7), *range(9)], (8, 1))
    segments[5:, 10:] = 0
    weights = rng.uniform(0.5, 1.5, (8, 16)) * (segments > 0)
    return Batch(*(a.astype(np.int32) for a in (tokens, targets, segments, positions)), weights.astype(np.float32))


def on_one_and_on_eight(cfg: TrainConfig, f, state, batch):
    """f(state, batch, ops) on the first device, and with the batch split over all of them."""
    assert jax.device_count() == 8
    place = placement(cfg, jax.devices())
    one = jax.jit(partial(f, ops=ON_ONE_DEVICE))(state, jax.device_put(batch, jax.devices()[0]))
    split = jax.device_put(batch, place.rows)
    eight = jax.jit(partial(f, ops=place.ops))(jax.device_put(state, place.replicated), split)
    assert {len(a.devices()) for a in jax.tree.leaves(eight)} == {8}
    return jax.device_get((one, eight))


def assert_same(ours, theirs, tolerance):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)


def test_a_step_on_eight_devices_is_a_step_on_one():
    cfg = config("float32")
    one, eight = on_one_and_on_eight(cfg, partial(train_step, cfg), a_state(cfg), a_batch())
    (one_state, one_metrics), (eight_state, eight_metrics) = one, eight
    assert_same((eight_state.params, eight_metrics), (one_state.params, one_metrics), 1e-5)
    assert_same(eight_state.opt_state, one_state.opt_state, 6e-5)  # gradients: their own distance from float64 in f32
    np.testing.assert_array_equal(eight[1].load_LE, one[1].load_LE)
    assert eight[1].finite and (eight[0].params["lm_head"] != a_state(cfg).params["lm_head"]).any()


@pytest.mark.slow
def test_gradients_in_bfloat16():
    """The products that ask for a memory layout are those in bf16: eight devices are as near to f32 as one is.

    Over eight draws, since a near tie may send a token to another expert.
    """
    cfg = dataclasses.replace(config("bfloat16"), mesh=MeshConfig(data=2, fsdp=4))
    place, batch = placement(cfg, jax.devices()), a_batch()
    split = jax.device_put(batch, place.rows)
    exactly, on_one, on_eight = (
        jax.jit(partial(batch_sums, c, ops=ops))
        for c, ops in ((config("float32"), ON_ONE_DEVICE), (cfg, ON_ONE_DEVICE), (cfg, place.ops))
    )
    far = []
    for seed in range(8):
        params = mild_state(cfg, seed).params
        exact, one = jax.device_get((exactly(params, batch), on_one(params, batch)))
        eight = jax.device_get(on_eight(jax.device_put(params, place.state.params), split))
        far.append([distance(sums.grads, exact.grads) for sums in (one, eight)])
        np.testing.assert_allclose(eight.loss, one.loss, rtol=2e-3)
    of_one, of_eight = np.sqrt(np.mean(np.square(far), axis=0))
    assert 0.01 < of_eight < 1.1 * of_one


def distance(grads, exact) -> float:
    """Of all gradients together, relative."""
    pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True))
    return float(np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)))
