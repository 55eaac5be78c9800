"""One training step on eight devices, the batch split over them, against the same step on one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kimi_jax import presets
from kimi_jax.data.packing import Batch
from kimi_jax.dims import map_specs
from kimi_jax.model import specs
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kimi_jax.training.step import TrainState, optimizer, train_step


def config(dtype: str) -> TrainConfig:
    model = presets.tiny().replace(
        vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=3,
        num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=12, kv_lora_rank=8,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dtype=dtype,
    )  # fmt: skip
    opt = OptimizerConfig(learning_rate=1e-2, ns_dtype="float32", ns_steps=3)
    return TrainConfig(model, optimizer=opt, schedule=ScheduleConfig(warmup_steps=0), batch_size=8, seq_len=16)


def a_state(cfg: TrainConfig) -> TrainState:
    rng = np.random.default_rng(0)

    def draw(spec):
        if spec.std is None:
            return jnp.asarray(spec.fill + 0.2 * rng.standard_normal(spec.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(spec.shape) / spec.shape[-2] ** 0.5, jnp.float32)

    params = map_specs(draw, specs(cfg.model))
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer(cfg).init(params))


def a_batch() -> Batch:
    """Rows of two documents, uneven weights, and padding in some rows only, so that devices differ."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 61, (2, 8, 16))
    segments, positions = np.tile([1] * 7 + [2] * 9, (8, 1)), np.tile([*range(7), *range(9)], (8, 1))
    segments[5:, 10:] = 0
    weights = rng.uniform(0.5, 1.5, (8, 16)) * (segments > 0)
    return Batch(*(a.astype(np.int32) for a in (tokens, targets, segments, positions)), weights.astype(np.float32))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_a_step_on_eight_devices_is_a_step_on_one(dtype, tolerance):
    assert jax.device_count() == 8
    cfg = config(dtype)
    step = jax.jit(train_step, static_argnums=0)
    state, metrics = jax.device_get(step(cfg, a_state(cfg), jax.device_put(a_batch(), jax.devices()[0])))

    mesh = jax.make_mesh((8,), ("data",))
    batch = jax.device_put(a_batch(), NamedSharding(mesh, PartitionSpec("data")))
    replicated = jax.device_put(a_state(cfg), NamedSharding(mesh, PartitionSpec()))
    found = step(cfg, replicated, batch)
    assert len(found[1].loss.devices()) == 8
    found_state, found_metrics = jax.device_get(found)

    assert found_metrics.finite
    for name in ("loss", "balance_loss", "grad_norm", "update_rms", "max_logits_LN"):
        np.testing.assert_allclose(getattr(found_metrics, name), getattr(metrics, name), rtol=tolerance, err_msg=name)
    if dtype == "float32":
        np.testing.assert_array_equal(found_metrics.load_LE, metrics.load_LE)
        for ours, theirs in zip(jax.tree.leaves(found_state), jax.tree.leaves(state), strict=True):
            distance = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
            assert distance <= tolerance * np.linalg.norm(np.asarray(theirs, np.float64))
