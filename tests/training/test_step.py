"""One optimizer step: accumulation, the router's bias, refusal of non-finite updates, and QK-Clip in place."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax import presets
from kimi_jax.data.packing import Batch
from kimi_jax.dims import map_specs
from kimi_jax.model import KimiK2, specs
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kimi_jax.training.step import TrainState, batch_sums, eval_step, init_state, optimizer, train_step

MODEL = presets.tiny().replace(
    vocab_size=61, hidden_size=24, intermediate_size=40, moe_intermediate_size=10, num_hidden_layers=3,
    num_attention_heads=2, n_routed_experts=6, num_experts_per_tok=2, q_lora_rank=12, kv_lora_rank=8,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, dtype="float32", experts="ragged",
)  # fmt: skip
CFG = TrainConfig(
    MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, ns_dtype="float32"),
    schedule=ScheduleConfig(warmup_steps=0),
    batch_size=4,
    seq_len=12,
    balance_loss_weight=0.1,
    bias_update_rate=0.01,
)


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def draw(spec):
        if spec.std is None:
            return jnp.asarray(spec.fill + 0.2 * rng.standard_normal(spec.shape), jnp.float32)
        return jnp.asarray(rng.standard_normal(spec.shape) / spec.shape[-2] ** 0.5, jnp.float32)

    return map_specs(draw, specs(MODEL))


def a_batch() -> Batch:
    """Four rows of two packed documents each, uneven weights, padding at the end of the last row."""
    rng = np.random.default_rng(1)
    tokens, targets = rng.integers(0, 61, (2, 4, 12))
    weights = rng.uniform(0.5, 1.5, (4, 12)) * (rng.uniform(size=(4, 12)) > 0.2)
    segments = np.tile([1] * 5 + [2] * 7, (4, 1))
    positions = np.tile([*range(5), *range(7)], (4, 1))
    segments[3, 8:] = 0
    weights[3, 8:] = 0
    return Batch(
        *(jnp.asarray(a, jnp.int32) for a in (tokens, targets, segments, positions)), jnp.asarray(weights, jnp.float32)
    )


def a_state(cfg: TrainConfig, params) -> TrainState:
    return TrainState(jnp.asarray(5, jnp.int32), params, optimizer(cfg).init(params))


STEP = jax.jit(train_step, static_argnums=0)


@pytest.fixture(scope="module")
def whole():
    """The sums of the batch in one piece."""
    return jax.device_get(jax.jit(partial(batch_sums, CFG))(parameters(), a_batch()))


def test_loss_is_the_mean_over_weighted_tokens(whole):
    params, batch = parameters(), a_batch()
    logits = KimiK2(MODEL).apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
    logits = np.asarray(logits, np.float64)
    nll = (
        np.log(np.exp(logits).sum(axis=-1))
        - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    )
    weights = np.asarray(batch.weights, np.float64)
    np.testing.assert_allclose(whole.loss, (weights * nll).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(partial(eval_step, CFG))(params, batch), (weights * nll).sum(), rtol=1e-5)
    np.testing.assert_array_equal(whole.load_LE.sum(axis=-1), 44 * 2)  # valid tokens, two experts each


@pytest.mark.parametrize("n", [2, 4])
def test_accumulation_gives_the_sums_of_the_whole_batch(n, whole):
    cfg = TrainConfig(**{**vars(CFG), "accumulation": n})
    found = jax.device_get(jax.jit(partial(batch_sums, cfg))(parameters(), a_batch()))
    np.testing.assert_array_equal(found.load_LE, whole.load_LE)
    np.testing.assert_allclose(found.max_logits_LN, whole.max_logits_LN, rtol=1e-6)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(found.balance_loss, whole.balance_loss, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found.grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_step_is_gradients_clipping_optimizer_and_bias(whole):
    cfg = TrainConfig(
        **{**vars(CFG), "optimizer": OptimizerConfig(learning_rate=1e-2, ns_dtype="float32", max_grad_norm=0.3)}
    )
    state = a_state(cfg, parameters())
    new, metrics = STEP(cfg, state, a_batch())
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(whole.grads)))
    assert norm > 0.3
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert bool(metrics.finite) and int(new.step) == 6

    clipped = jax.tree.map(lambda g: g * np.float32(0.3 / norm), whole.grads)
    updates, _ = optimizer(cfg).update(clipped, state.opt_state, state.params, max_logits=whole.max_logits_LN)
    expected = optax.apply_updates(state.params, updates)
    expected["moe_layers"]["moe"]["router"].pop("bias")
    ours = jax.device_get(new.params)
    bias = ours["moe_layers"]["moe"]["router"].pop("bias")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

    before = np.asarray(state.params["moe_layers"]["moe"]["router"]["bias"], np.float64)
    direction = np.sign(whole.load_LE.mean(axis=-1, keepdims=True) - whole.load_LE)
    np.testing.assert_allclose(bias, before + 0.01 * (direction - direction.mean(axis=-1, keepdims=True)), atol=1e-7)


def test_bias_moves_once_per_step_whatever_the_accumulation():
    biases = []
    for n in (1, 4):
        cfg = TrainConfig(**{**vars(CFG), "accumulation": n})
        new, _ = STEP(cfg, a_state(cfg, parameters()), a_batch())
        biases.append(np.asarray(new.params["moe_layers"]["moe"]["router"]["bias"]))
    np.testing.assert_array_equal(*biases)


def test_bias_knows_no_gradient_and_no_decay():
    cfg = TrainConfig(**{**vars(CFG), "bias_update_rate": 0.0})
    state = a_state(cfg, parameters())
    new, _ = STEP(cfg, state, a_batch())
    old_router, new_router = (s.params["moe_layers"]["moe"]["router"] for s in (state, new))
    np.testing.assert_array_equal(new_router["bias"], old_router["bias"])
    assert (np.asarray(new_router["weight"]) != np.asarray(old_router["weight"])).any()


@pytest.mark.parametrize("place", ["embedding", "lm_head"])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_non_finite_step_leaves_everything_as_it_was(place, value):
    params = parameters()
    token = int(a_batch().tokens[0, 0])
    where = (token, 3) if place == "embedding" else (3, token)
    params[place] = params[place].at[where].set(value)
    state = a_state(CFG, params)
    new, metrics = STEP(CFG, state, a_batch())
    assert not bool(metrics.finite) and int(new.step) == int(state.step) + 1
    for ours, before in zip(jax.tree.leaves(new[1:]), jax.tree.leaves(state[1:]), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(before).tobytes()


def test_nothing_to_learn_is_not_an_error():
    batch = a_batch()
    _, metrics = STEP(CFG, a_state(CFG, parameters()), batch._replace(weights=jnp.zeros_like(batch.weights)))
    assert bool(metrics.finite) and float(metrics.loss) == 0


@pytest.mark.parametrize("name", ["muon_clip", "adamw"])
def test_qk_clip_brings_the_logits_down_to_tau(name):
    """Learning rate 0, so that only the clip acts; attention that writes nothing, so that layers do not interact."""
    params = parameters()
    for stack in ("dense_layers", "moe_layers"):
        attn = params[stack]["attn"]
        heads = jnp.asarray([1.0, 4.0])[:, None]
        attn |= {"o": 0 * attn["o"], "q_b": heads * attn["q_b"], "kv_b": 2 * attn["kv_b"]}
    first = parameters_logits(params)
    tau = float(np.median(first))
    cfg = TrainConfig(
        **{
            **vars(CFG),
            "optimizer": OptimizerConfig(name=name, learning_rate=0.0, tau=tau, ns_dtype="float32"),
            "accumulation": 2,
            "bias_update_rate": 0.0,
        }
    )
    state, metrics = STEP(cfg, a_state(cfg, params), a_batch())
    before = np.asarray(metrics.max_logits_LN)
    np.testing.assert_allclose(before, first, rtol=1e-5)
    assert 0 < (before > tau).sum() < before.size
    np.testing.assert_allclose(metrics.heads_ever_clipped, 0)  # so far: before this step
    np.testing.assert_array_equal(state.opt_state.ever_clipped, before > tau)
    np.testing.assert_allclose(parameters_logits(state.params), np.minimum(before, tau), rtol=1e-4)


@jax.jit
def _stats(params):
    batch = a_batch()
    return KimiK2(MODEL).apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids, stats=True)[1]


def parameters_logits(params) -> np.ndarray:
    return np.asarray(_stats(params).max_logits_LN)


def test_initial_state_matches_the_model():
    state = jax.eval_shape(partial(init_state, CFG))
    assert jax.tree.map(lambda a: a.shape, state.params) == map_specs(lambda spec: spec.shape, specs(MODEL))
    assert state.step.shape == () and state.step.dtype == jnp.int32
