"""Every way of computing the routed experts against float64, in values and in gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.errors import UserError
from kimi_jax.layers import blocked_experts
from kimi_jax.layers.blocked_experts import SMALL, blocked_experts_of, cut, ladder
from kimi_jax.layers.experts import EXPERT_PATHS, fastest_experts_of, run
from kimi_jax.layers.quantized import Quantized
from kimi_jax.layers.ragged_experts import ragged_experts_of

D, F = 10, 7


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Pieces are computed at their own sizes, small as they are here."""
    monkeypatch.setattr(blocked_experts, "SMALL", 0)


def random(M: int, E: int, K: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(E)[:K] for _ in range(M)])


def one_takes_all(M: int, E: int, K: int) -> np.ndarray:
    """The last expert is chosen by every token; of the others, the even ones by none."""
    return np.concatenate([np.full((M, 1), E - 1), 2 * random(M, E // 2 - 1, K - 1) + 1], axis=1)


CASES = {  # name -> experts, and the assignment [M, K] of tokens to them; few shapes, for each is compiled
    "balanced": (16, np.arange(450).reshape(150, 3) % 16),
    "random": (16, random(150, 16, 3)),
    "one takes all": (16, one_takes_all(150, 16, 3)),
    "three take all": (16, np.tile([0, 7, 6], (150, 1))),
    "one of many": (12, random(50, 12, 1)),
    "single token": (8, random(1, 8, 3)),
    "every expert": (4, random(37, 4, 4)),
}


def inputs(name: str):
    E, experts_MK = CASES[name]
    M, K = experts_MK.shape
    rng = np.random.default_rng(1)
    p = {
        "gate": rng.standard_normal((E, D, F)) / 2,
        "up": rng.standard_normal((E, D, F)) / 2,
        "down": rng.standard_normal((E, F, D)) / 2,
    }
    x, weights, dy = rng.standard_normal((M, D)), rng.uniform(0.1, 1, (M, K)), rng.standard_normal((M, D))
    exact = lambda a: np.asarray(a.astype(jnp.bfloat16), np.float64)  # noqa: E731
    return jax.tree.map(exact, p), exact(x), exact(weights), experts_MK, exact(dy)


def reference(p, x, weights, experts, dy):
    """Output and gradients of every input, one assignment at a time in float64."""
    y, dx, dweights = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weights)
    dp = {name: np.zeros_like(w) for name, w in p.items()}
    for m, k in np.ndindex(experts.shape):
        e = experts[m, k]
        gate, up = x[m] @ p["gate"][e], x[m] @ p["up"][e]
        sigmoid = 1 / (1 + np.exp(-gate))
        h = gate * sigmoid * up
        y[m] += weights[m, k] * h @ p["down"][e]
        dweights[m, k] = h @ p["down"][e] @ dy[m]
        dh = weights[m, k] * p["down"][e] @ dy[m]
        dup, dgate = dh * gate * sigmoid, dh * up * sigmoid * (1 + gate * (1 - sigmoid))
        dx[m] += p["gate"][e] @ dgate + p["up"][e] @ dup
        dp["gate"][e] += np.outer(x[m], dgate)
        dp["up"][e] += np.outer(x[m], dup)
        dp["down"][e] += weights[m, k] * np.outer(h, dy[m])
    return y, dp, dx, dweights


def as_arrays(dtype, p, x, weights, experts, dy):
    params = {name: jnp.asarray(w, jnp.float32) for name, w in p.items()}
    return (
        params,
        jnp.asarray(x, dtype),
        jnp.asarray(weights, jnp.float32),
        jnp.asarray(experts),
        jnp.asarray(dy, dtype),
    )


def value_and_gradients(path: str, params, x, weights, experts, dy):
    y, pullback = jax.vjp(lambda *args: EXPERT_PATHS[path](*args, experts), params, x, weights)
    return y, *pullback(dy)


compiled = jax.jit(value_and_gradients, static_argnums=0)


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in EXPERT_PATHS if path != "fastest" for name in CASES] + [("fastest", "random")],
)
def test_float32(path, name):
    problem = inputs(name)
    found = compiled(path, *as_arrays(jnp.float32, *problem))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(reference(*problem)), strict=True):
        assert ours.dtype == jnp.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6 * np.abs(theirs).max())


def test_small_products_are_computed_at_one_size(monkeypatch):
    monkeypatch.setattr(blocked_experts, "SMALL", SMALL)
    assert len(ladder(450, 16, D * F)) == 1 and len(ladder(450, 16, SMALL)) > 1
    problem = inputs("one takes all")
    found = jax.jit(lambda *args: value_and_gradients("blocked", *args))(*as_arrays(jnp.float32, *problem))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(reference(*problem)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=3e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("path", ["blocked", "ragged", "looped"])
def test_bfloat16(path):
    problem = inputs("one takes all")
    y, dp, dx, dweights = found = compiled(path, *as_arrays(jnp.bfloat16, *problem))
    assert y.dtype == dx.dtype == jnp.bfloat16
    assert {a.dtype for a in jax.tree.leaves((dp, dweights))} == {jnp.dtype("float32")}
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(reference(*problem)), strict=True):
        distance = np.linalg.norm(np.asarray(ours, np.float64) - theirs)
        assert distance <= 1e-2 * np.linalg.norm(theirs)


@pytest.mark.parametrize("f", [blocked_experts_of, fastest_experts_of])
def test_one_layer_of_a_stack(f):
    problems = [inputs("single token") for _ in range(3)]
    for i, (p, *_) in enumerate(problems):
        for name in p:
            p[name] *= 1 + i
    stack = {name: jnp.asarray(np.stack([p[name] for p, *_ in problems]), jnp.float32) for name in problems[0][0]}
    run = jax.jit(f)
    for i, problem in enumerate(problems):
        _, *args, _ = as_arrays(jnp.float32, *problem)
        expected, *_ = reference(*problem)
        np.testing.assert_allclose(run(stack, jnp.asarray(i), *args), expected, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("blocks", [(4, 3), (10, 1)])
@pytest.mark.parametrize("f", [blocked_experts_of, ragged_experts_of])
def test_eight_bit_weights_and_rows_of_no_expert(f, blocks):
    _, x, weights, experts, dy = inputs("random")
    experts = np.where(experts > 12, 16, experts)
    rng, stack, plain = np.random.default_rng(2), {}, {}
    for name, (X, Y) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
        values = rng.integers(-9, 10, (2, 16, X, Y))
        scale = rng.uniform(0.02, 0.05, (2, 16, -(-X // blocks[0]), -(-Y // blocks[1]))).astype(np.float32)
        stack[name] = Quantized(jnp.asarray(values, jnp.int8), jnp.asarray(scale), blocks)
        plain[name] = np.zeros((17, X, Y))
        plain[name][:16] = values[1] * np.repeat(np.repeat(scale[1], blocks[0], 1), blocks[1], 2)[:, :X, :Y]
    arguments = as_arrays(jnp.float32, {}, x, weights, experts, dy)[1:4]
    expected, *_ = reference(plain, x, weights, experts, dy)
    found, own = jax.jit(f)(stack, 1, *arguments), (experts < 16).all(axis=1)
    np.testing.assert_allclose(found[own], expected[own], atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("sizes", [[0, 0, 5, 0], [1, 1, 1, 1], [0, 900, 3, 1], [17, 0, 16, 33], [0, 0, 0, 1000]])
def test_pieces_cover_every_row_once_and_never_cross_an_expert(sizes):
    n_rows = sum(sizes)
    longest = ladder(n_rows, len(sizes), D * F)[-1]
    pieces = jax.tree.map(np.asarray, cut(jnp.asarray(sizes), n_rows, longest))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    covered = []
    assert pieces.count <= len(pieces.start_I)
    for i in range(pieces.count):
        start, end = pieces.start_I[i], pieces.end_I[i]
        assert 0 < end - start <= longest
        assert (owner[start:end] == pieces.expert_I[i]).all()
        covered += range(start, end)
    assert covered == list(range(n_rows))


def test_unknown_path():
    params, x, weights, experts, _ = as_arrays(jnp.float32, *inputs("random"))
    with pytest.raises(UserError, match="model.experts 'fast'; there are fastest"):
        run({"experts": params}, presets.tiny().replace(experts="fast"), x, weights, experts)
