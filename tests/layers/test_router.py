"""Routing, loads, balance loss and selection bias against float64 and brute force."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.layers.router import Routing, loads, route, sequence_balance_loss, updated_bias

CFG = presets.tiny().replace(hidden_size=12, n_routed_experts=9, num_experts_per_tok=3, routed_scaling_factor=2.5)
B, T, D, E, K = 2, 20, 12, 9, 3


def parameters(bias_std: float):
    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((D, E)) / 3, bias_std * rng.standard_normal(E)
    return {"weight": jnp.asarray(weight, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}


def tokens(dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(1).standard_normal((B, T, D)), dtype)


def reference(p, x, normalise=True):
    """(experts of each token as a set, weight of each of them), one token at a time in float64."""
    x, weight, bias = (np.asarray(a, np.float64) for a in (x, p["weight"], p["bias"]))
    found = []
    for score in (1 / (1 + np.exp(-(x @ weight)))).reshape(B * T, E):
        chosen = sorted(range(E), key=lambda e, score=score: -(score[e] + bias[e]))[:K]
        total = sum(score[e] for e in chosen) if normalise else 1.0
        found.append({e: 2.5 * score[e] / total for e in chosen})
    return found


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("bias_std", [0.0, 0.3])
def test_route(dtype, normalise, bias_std):
    p, x = parameters(bias_std), tokens(dtype)
    routing = route(p, CFG.replace(norm_topk_prob=normalise), x)
    assert routing.weights_BTK.dtype == routing.scores_BTE.dtype == jnp.float32
    experts, weights = (np.asarray(a).reshape(B * T, K) for a in (routing.experts_BTK, routing.weights_BTK))
    for row, expected in enumerate(reference(p, x, normalise)):
        ours = dict(zip(experts[row].tolist(), weights[row].tolist(), strict=True))
        assert ours == pytest.approx(expected, rel=2e-6)


def test_bias_steers_the_choice_and_nothing_else():
    p, x = parameters(0.0), tokens()
    forced = {**p, "bias": jnp.full(E, -9.0).at[jnp.asarray([1, 4, 8])].set(9.0)}
    routing = route(forced, CFG, x)
    assert (np.sort(routing.experts_BTK, axis=-1) == [1, 4, 8]).all()
    np.testing.assert_allclose(np.sum(routing.weights_BTK, axis=-1), 2.5, rtol=1e-6)
    scores = np.take_along_axis(np.asarray(route(p, CFG, x).scores_BTE), np.asarray(routing.experts_BTK), axis=-1)
    np.testing.assert_allclose(routing.weights_BTK, 2.5 * scores / scores.sum(axis=-1, keepdims=True), rtol=1e-6)


def test_gradients_reach_the_weight_and_not_the_bias():
    p, x = parameters(0.3), tokens()
    mix = jnp.asarray(np.random.default_rng(2).standard_normal((B, T, K)), jnp.float32)
    dp, dx = jax.jit(jax.grad(lambda p, x: jnp.sum(mix * route(p, CFG, x).weights_BTK), (0, 1)))(p, x)
    assert not np.asarray(dp["bias"]).any()

    experts = np.asarray(route(p, CFG, x).experts_BTK)
    x, weight, mix = (np.asarray(a, np.float64) for a in (x, p["weight"], mix))

    def loss(x, weight):
        score = np.take_along_axis(1 / (1 + np.exp(-(x @ weight))), experts, axis=-1)
        return np.sum(mix * 2.5 * score / score.sum(axis=-1, keepdims=True))

    for ours, at, other in ((dp["weight"], weight, lambda w: loss(x, w)), (dx, x, lambda y: loss(y, weight))):
        for _ in range(5):
            direction = np.random.default_rng(3).standard_normal(at.shape)
            slope = (other(at + 1e-5 * direction) - other(at - 1e-5 * direction)) / 2e-5
            assert np.sum(np.asarray(ours, np.float64) * direction) == pytest.approx(slope, rel=1e-5)


def routing_of(scores: np.ndarray, experts: np.ndarray, n_sequences: int = 1) -> Routing:
    """Of flat tokens, cut into sequences."""
    scores, experts = (a.reshape(n_sequences, -1, a.shape[-1]) for a in (scores, experts))
    return Routing(jnp.asarray(experts), jnp.ones(experts.shape), jnp.asarray(scores, jnp.float32))


def test_loads_and_balance_loss_by_brute_force():
    B, T = 3, 8
    rng = np.random.default_rng(4)
    scores = rng.uniform(0.05, 1, (B * T, E))
    experts = np.stack([rng.permutation(E)[:K] for _ in range(B * T)])
    valid = np.ones((B, T), bool)
    valid[1, 5:] = False
    valid[2, :] = False
    load = np.zeros((B, E))
    for b, t, k in np.ndindex(B, T, K):
        load[b, experts[b * T + t, k]] += valid[b, t]
    losses = []
    for b in range(2):  # the third sequence is all padding
        n = valid[b].sum()
        mean_share = np.zeros(E)
        for t in range(T):
            mean_share += valid[b, t] * scores[b * T + t] / scores[b * T + t].sum() / n
        losses.append(sum(E / (K * n) * load[b, e] * mean_share[e] for e in range(E)))

    routing = routing_of(scores, experts, B)
    found = loads(routing, jnp.asarray(valid))
    np.testing.assert_array_equal(found, load)
    loss = sequence_balance_loss(routing, found, jnp.asarray(valid))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-6)


def test_balance_loss_is_one_when_balanced_and_more_when_not():
    experts = (np.arange(E)[:, None] + np.arange(K)) % E  # every expert is chosen K times in E tokens
    valid = jnp.ones((1, E), bool)
    even = routing_of(np.full((E, E), 0.5), experts)
    assert float(sequence_balance_loss(even, loads(even, valid), valid)) == pytest.approx(1)
    favoured = np.full((E, E), 0.1)
    favoured[:, :K] = 0.9
    skewed = routing_of(favoured, np.tile(np.arange(K), (E, 1)))
    assert float(sequence_balance_loss(skewed, loads(skewed, valid), valid)) > 1.5


def test_balance_loss_of_padding_alone_is_zero_with_finite_gradients():
    x, valid = tokens(), jnp.zeros((B, T), bool)

    def loss(p):
        routing = route(p, CFG, x)
        return sequence_balance_loss(routing, loads(routing, valid), valid)

    value, grad = jax.value_and_grad(loss)(parameters(0.0))
    assert float(value) == 0 and not np.asarray(grad["weight"]).any()


def test_updated_bias():
    bias, load = np.asarray([[0.5, 0, -1, 2.0], [0, 0, 0, 0]]), np.asarray([[8, 0, 4, 4.0], [1, 1, 1, 9]])
    ours = updated_bias(jnp.asarray(bias, jnp.float32), jnp.asarray(load, jnp.float32), 0.1)
    directions = np.asarray([[-1, 1, 0, 0], [1, 1, 1, -1]])  # towards experts below the mean load of 4, or of 3
    centred = directions - np.asarray([[0], [0.5]])
    np.testing.assert_allclose(ours, bias + 0.1 * centred, atol=1e-7)
    np.testing.assert_allclose(np.sum(ours, axis=-1), bias.sum(axis=-1), atol=1e-6)
