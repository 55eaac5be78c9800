"""One optimizer step: accumulation, the router's bias, refusal of non-finite updates, and QK-Clip in place."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax.data.packing import Batch
from kimi_jax.dims import map_specs
from kimi_jax.model import KimiK2, specs
from kimi_jax.training.config import OptimizerConfig, ScheduleConfig, TrainConfig
from kimi_jax.training.step import TrainState, Whole, batch_sums, eval_step, init_state, optimizer, train_step
from tests import tiny

MODEL = tiny.CFG.replace(experts="ragged")
parameters = partial(tiny.parameters, MODEL)
CFG = TrainConfig(
    MODEL,
    optimizer=OptimizerConfig(learning_rate=1e-2, ns_dtype="float32", max_grad_norm=0.3),
    schedule=ScheduleConfig(warmup_steps=0, decay_tokens=480),
    batch_size=4,
    seq_len=12,
    balance_loss_weight=0.1,
    bias_update_rate=0.01,
)


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


@pytest.mark.parametrize(("scale", "total"), [(1.0, None), (1e-3, None), (0.0, 1.0)])
def test_what_a_batch_weighs(scale, total):
    """Its weights' sum, however small; one that weighs nothing is divided by 1."""
    weights = scale * a_batch().weights
    np.testing.assert_allclose(Whole.of(a_batch()._replace(weights=weights)).weight, total or weights.sum())


def bias_of(state: TrainState) -> np.ndarray:
    return np.asarray(state.params["moe_layers"]["moe"]["router"]["bias"], np.float64)


def expected_bias(state: TrainState, load_LE: np.ndarray) -> np.ndarray:
    direction = np.sign(load_LE.mean(axis=-1, keepdims=True) - load_LE)
    return bias_of(state) + CFG.bias_update_rate * (direction - direction.mean(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def whole():
    """The sums of the batch in one piece."""
    return jax.device_get(jax.jit(partial(batch_sums, CFG))(parameters(), a_batch()))


def test_loss_is_the_mean_over_weighted_tokens(whole):
    params, batch = parameters(), a_batch()
    logits = jax.jit(KimiK2(MODEL).apply)({"params": params}, batch.tokens, batch.positions, batch.segment_ids)
    logits = np.asarray(logits, np.float64)
    nll = (
        np.log(np.exp(logits).sum(axis=-1))
        - np.take_along_axis(logits, np.asarray(batch.targets)[..., None], -1)[..., 0]
    )
    weights = np.asarray(batch.weights, np.float64)
    np.testing.assert_allclose(whole.loss, (weights * nll).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(partial(eval_step, CFG))(params, batch), (weights * nll).sum(), rtol=1e-5)
    np.testing.assert_array_equal(whole.load_LE.sum(axis=-1), 44 * 2)  # valid tokens, two experts each


def test_accumulation_gives_the_sums_of_the_whole_batch(whole):
    found = jax.device_get(
        jax.jit(partial(batch_sums, dataclasses.replace(CFG, accumulation=4)))(parameters(), a_batch())
    )
    np.testing.assert_array_equal(found.load_LE, whole.load_LE)
    np.testing.assert_allclose(found.max_logits_LN, whole.max_logits_LN, rtol=1e-6)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-6)
    np.testing.assert_allclose(found.balance_loss, whole.balance_loss, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found.grads), jax.tree.leaves(whole.grads), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_step_is_gradients_clipping_optimizer_and_bias(whole):
    state = a_state(CFG, parameters())
    new, metrics = STEP(CFG, state, a_batch())
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in jax.tree.leaves(whole.grads)))
    assert norm > 0.3
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    assert bool(metrics.finite) and int(new.step) == 6

    clipped = jax.tree.map(lambda g: g * np.float32(0.3 / norm), whole.grads)
    update = jax.jit(optimizer(CFG).update)
    np.testing.assert_allclose(metrics.learning_rate, 1e-2, rtol=1e-6)  # the optimizer's first step; five were skipped
    updates, _ = update(clipped, state.opt_state, state.params, max_logits=whole.max_logits_LN)
    expected = optax.apply_updates(state.params, updates)
    expected["moe_layers"]["moe"]["router"].pop("bias")
    ours = jax.device_get(new.params)
    bias = ours["moe_layers"]["moe"]["router"].pop("bias")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())

    np.testing.assert_allclose(bias, expected_bias(state, whole.load_LE), atol=1e-7)  # no gradient, no decay


@pytest.mark.slow
def test_accumulated_step_with_adamw(whole):
    """What does not depend on the optimizer is that of the whole batch; the bias moves once."""
    adamw = dataclasses.replace(CFG.optimizer, name="adamw")
    cfg = dataclasses.replace(CFG, optimizer=adamw, accumulation=2)
    state = a_state(cfg, parameters())
    new, metrics = STEP(cfg, state, a_batch())
    np.testing.assert_allclose(metrics.loss, whole.loss, rtol=1e-6)
    np.testing.assert_array_equal(metrics.load_LE, whole.load_LE)
    np.testing.assert_allclose(metrics.max_logits_LN, whole.max_logits_LN, rtol=1e-6)
    np.testing.assert_allclose(bias_of(new), expected_bias(state, whole.load_LE), atol=1e-7)
    grad = np.float64(0.3) / np.float64(metrics.grad_norm) * whole.grads["lm_head"]
    old = np.asarray(state.params["lm_head"], np.float64)
    expected = old - 1e-2 * (grad / (np.abs(grad) + 1e-8) + 0.1 * old)  # Adam's first step
    clear = np.abs(whole.grads["lm_head"]) > 1e-4 * np.abs(whole.grads["lm_head"]).max()
    np.testing.assert_allclose(np.asarray(new.params["lm_head"])[clear], expected[clear], atol=1e-5)


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


def test_norms_of_weights_in_bfloat16():
    """Without experts no parameter is f32, as the router's bias always is."""
    model = MODEL.replace(first_k_dense_replace=MODEL.num_hidden_layers, param_dtype="bfloat16")
    cfg = dataclasses.replace(CFG, model=model)
    state, batch = init_state(cfg), a_batch()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
    grads = jax.tree.leaves(jax.jit(batch_sums, static_argnums=0)(cfg, state.params, batch).grads)
    new, metrics = STEP(cfg, state, batch)
    moved = jax.tree.map(lambda a, b: np.asarray(a, np.float64) - np.asarray(b, np.float64), new.params, state.params)
    rms = np.sqrt(np.mean(np.concatenate([m.ravel() for m in jax.tree.leaves(moved)]) ** 2))
    norm = np.sqrt(sum(np.sum(np.asarray(g, np.float64) ** 2) for g in grads))
    np.testing.assert_allclose(metrics.grad_norm, norm, rtol=1e-5)
    np.testing.assert_allclose(metrics.update_rms, rms, rtol=2e-2)  # after rounding to bf16


def test_skipped_steps_are_counted_in_the_state():
    """So that a run that was stopped in between goes on with their number."""
    state, good = init_state(CFG, parameters()), a_batch()
    bad = good._replace(weights=good.weights.at[0, 0].set(jnp.inf))
    counts = []
    for batch in (bad, good, bad, bad, good):
        state, metrics = STEP(CFG, state, batch)
        counts.append(int(metrics.skipped))
    assert counts == [1, 1, 2, 3, 3]


def test_nothing_to_learn_is_not_an_error():
    batch = a_batch()
    _, metrics = STEP(CFG, a_state(CFG, parameters()), batch._replace(weights=jnp.zeros_like(batch.weights)))
    assert bool(metrics.finite) and float(metrics.loss) == 0


def test_qk_clip_brings_the_logits_down_to_tau():
    """Learning rate 0, so that only the clip acts; attention that writes nothing, so that layers do not interact."""
    params = parameters()
    for stack in ("dense_layers", "moe_layers"):
        attn = params[stack]["attn"]
        heads = jnp.asarray([1.0, 4.0])[:, None]
        attn |= {"o": 0 * attn["o"], "q_b": heads * attn["q_b"], "kv_b": 2 * attn["kv_b"]}
    first = max_logits(params)
    tau = float(np.median(first))
    clip_alone = dataclasses.replace(CFG.optimizer, learning_rate=0.0, tau=tau)
    cfg = dataclasses.replace(CFG, optimizer=clip_alone, accumulation=2, bias_update_rate=0.0)
    state, metrics = STEP(cfg, a_state(cfg, params), a_batch())
    before = np.asarray(metrics.max_logits_LN)
    np.testing.assert_allclose(before, first, rtol=1e-5)
    assert 0 < (before > tau).sum() < before.size
    np.testing.assert_array_equal(state.opt_state.ever_clipped, before > tau)
    np.testing.assert_allclose(metrics.heads_ever_clipped, np.mean(before > tau))
    np.testing.assert_allclose(max_logits(state.params), np.minimum(before, tau), rtol=1e-4)


@jax.jit
def max_logits(params):
    batch = a_batch()
    _, stats = KimiK2(MODEL).apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids, stats=True)
    return stats.max_logits_LN


def test_initial_state_matches_the_model():
    state = jax.eval_shape(partial(init_state, CFG))
    assert jax.tree.map(lambda a: a.shape, state.params) == map_specs(lambda spec: spec.shape, specs(MODEL))
    assert state.step.shape == () and state.step.dtype == jnp.int32
