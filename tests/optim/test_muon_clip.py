"""MuonClip against a float64 reference written out here, on plain trees and on the model's stacked one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax import presets
from kimi_jax.dims import BUFFER, EXPERTS, HEADS, LAYERS, VOCAB, Fused, axes_of, map_specs
from kimi_jax.model import specs
from kimi_jax.optim import adamw, muon_clip, newton_schulz

LR, DECAY, STEPS = 0.02, 0.1, 10


def orthogonalise(m: np.ndarray) -> np.ndarray:
    """Five quintic Newton-Schulz steps in float64."""
    x = m.T if m.shape[0] > m.shape[1] else m
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


class Matrix:
    """Muon on one float64 matrix."""

    def __init__(self, nesterov: bool):
        self.buffer, self.nesterov = 0.0, nesterov

    def step(self, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        self.buffer = 0.95 * self.buffer + g
        o = orthogonalise(0.95 * self.buffer + g if self.nesterov else self.buffer)
        return w - LR * (0.2 * max(w.shape) ** 0.5 * o + DECAY * w)


class Adam:
    def __init__(self):
        self.m = self.v = self.t = 0

    def step(self, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        self.t += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.95 * self.v + 0.05 * g**2
        m_hat, v_hat = self.m / (1 - 0.9**self.t), self.v / (1 - 0.95**self.t)
        return w - LR * (m_hat / (np.sqrt(v_hat) + 1e-8) + DECAY * w)


def run(transform, params, seed=0, **extra):
    state = transform.init(params)
    update = jax.jit(transform.update)
    for i in range(STEPS):
        updates, state = update(gradients(params, seed + i), state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def gradients(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), jnp.float32), params)


def parameters(shapes, seed=99):
    rng = np.random.default_rng(seed)
    leaf = lambda x: isinstance(x, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s), jnp.float32), shapes, is_leaf=leaf)


def assert_close(ours, theirs):
    assert np.linalg.norm(np.asarray(ours, np.float64) - theirs) <= 1e-5 * np.linalg.norm(theirs)


@pytest.mark.parametrize("nesterov", [True, False])
def test_any_tree_without_axes(nesterov):
    params = parameters(
        {"w": (12, 20), "tall": (30, 7), "bias": (5,), "embedding": (11, 6), "lm_head": {"kernel": (6, 11)}, "conv": (2, 3, 4)}
    )
    ours, state = run(muon_clip(LR, nesterov=nesterov, ns_dtype=jnp.float32), params)
    flat = jax.tree_util.tree_leaves_with_path(params)
    for path, w in flat:
        name = jax.tree_util.keystr(path)
        reference = Matrix(nesterov) if name in ("['w']", "['tall']") else Adam()
        expected = np.asarray(w, np.float64)
        for i in range(STEPS):
            g = dict((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(gradients(params, i)))
            expected = reference.step(expected, np.asarray(g[name], np.float64))
        found = dict((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(ours))[name]
        assert_close(found, expected)
    assert isinstance(state.second["w"], optax.MaskedNode)
    assert state.second["embedding"].shape == (11, 6)


NOPE_ROPE = Fused((("nope", 4), ("rope", 2)))
AXES = {
    "q_b": (LAYERS, "q_lora", HEADS, NOPE_ROPE),
    "o": (LAYERS, HEADS, "value", "embed"),
    "gate": (LAYERS, EXPERTS, "embed", "expert_mlp"),
    "router": (LAYERS, "embed", "router"),
    "bias": (LAYERS, BUFFER),
    "gain": (LAYERS, "embed"),
    "embedding": (VOCAB, "embed"),
}
SHAPES = {
    "q_b": (2, 9, 3, 6),
    "o": (2, 3, 5, 8),
    "gate": (2, 4, 8, 6),
    "router": (2, 8, 4),
    "bias": (2, 4),
    "gain": (2, 8),
    "embedding": (13, 8),
}


def expected_leaf(name: str, w: np.ndarray, grads: list[np.ndarray], split: bool) -> np.ndarray:
    """Each layer's and expert's matrix on its own, by explicit loops."""
    if name == "bias":
        return w
    if name in ("gain", "embedding"):
        adam = Adam()
        for g in grads:
            w = adam.step(w, g)
        return w
    out = np.empty_like(w)
    n_stacks = 2 if name == "gate" else 1
    for index in np.ndindex(w.shape[:n_stacks]):
        columns = [slice(0, 4), slice(4, 6)] if split and name == "q_b" else [slice(None)]
        for part in columns:
            piece = w[index][..., part]
            rows = {"q_b": 9, "o": 15, "gate": 8, "router": 8}[name]
            matrix, muon = piece.reshape(rows, -1), Matrix(True)
            for g in grads:
                matrix = muon.step(matrix, g[index][..., part].reshape(rows, -1))
            out[index][..., part] = matrix.reshape(piece.shape)
    return out


@pytest.mark.parametrize("split", [False, True])
def test_stacked_layers_experts_and_heads(split):
    params = parameters(SHAPES)
    transform = muon_clip(LR, axes=AXES, split_fused=split, ns_dtype=jnp.float32, tau=None)
    ours, state = run(transform, params)
    for name, w in params.items():
        grads = [np.asarray(gradients(params, i)[name], np.float64) for i in range(STEPS)]
        assert_close(ours[name], expected_leaf(name, np.asarray(w, np.float64), grads, split))
    assert isinstance(state.momentum["bias"], optax.MaskedNode)
    assert [name for name in params if not isinstance(state.second[name], optax.MaskedNode)] == ["embedding", "gain"]


def test_model_tree_structure():
    cfg = presets.tiny()
    shapes = map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), specs(cfg))
    transform = muon_clip(1e-3, axes=axes_of(specs(cfg)))
    state = jax.eval_shape(transform.init, shapes)
    maxima = jax.ShapeDtypeStruct((cfg.num_hidden_layers, cfg.num_attention_heads), jnp.float32)
    updates, after = jax.eval_shape(lambda g, s, p, m: transform.update(g, s, p, max_logits=m), shapes, state, shapes, maxima)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, shapes)
    assert state.ever_clipped.shape == (4, 4)
    second = state.second["moe_layers"]
    assert isinstance(second["moe"]["experts"]["gate"], optax.MaskedNode)
    assert second["attn_norm"].shape == (3, 128)


def test_newton_schulz_singular_values_and_pieces():
    m = np.random.default_rng(0).standard_normal((37, 256, 512)).astype(np.float32)  # 37: not a multiple of a piece
    values = np.linalg.svd(np.asarray(newton_schulz(jnp.asarray(m[:2]), dtype=jnp.float32)), compute_uv=False)
    assert values.min() > 0.68 and values.max() < 1.21
    stacked = newton_schulz(jnp.asarray(m), dtype=jnp.float32)
    for i in (0, 19, 36):
        assert_close(stacked[i], orthogonalise(m[i].astype(np.float64)))
    tall = newton_schulz(jnp.asarray(m[:3]).swapaxes(1, 2), dtype=jnp.float32)
    np.testing.assert_allclose(tall.swapaxes(1, 2), stacked[:3], atol=1e-6)
    half = np.asarray(newton_schulz(jnp.asarray(m[:2]), dtype=jnp.bfloat16))
    assert np.linalg.norm(half - stacked[:2]) < 5e-2 * np.linalg.norm(stacked[:2])
    assert 0.17 < 0.2 * 512**0.5 * half.std() < 0.2


@pytest.mark.parametrize("make", [muon_clip, adamw])
def test_contract(make):
    """What optax expects of any transform: chaining with extra arguments, dtypes, pure decay, stable structure."""
    params = {"w": jnp.ones((4, 6), jnp.bfloat16), "g": jnp.ones(6)}
    transform = optax.chain(optax.clip_by_global_norm(1.0), make(LR))
    state = transform.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, after = transform.update(zero, state, params, max_logits=None)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)
    np.testing.assert_allclose(params["g"] + updates["g"], 1 - LR * DECAY, rtol=1e-6)
    with pytest.raises(ValueError, match="parameters"):
        transform.update(zero, state)


@pytest.mark.parametrize("make", [partial(muon_clip, 0.05), partial(adamw, 0.05)])
def test_finds_the_minimum(make):
    target = jnp.asarray(np.random.default_rng(3).standard_normal((6, 8)), jnp.float32)
    transform = make(weight_decay=0.0)
    params = {"w": jnp.zeros_like(target)}
    state = transform.init(params)
    step = jax.jit(lambda p, s: transform.update({"w": p["w"] - target}, s, p))
    for _ in range(200):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert jnp.abs(params["w"] - target).mean() < 0.1


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"w": ("a", "b")}, "x"),
        ({"w": ("a",), "x": ("a",)}, "'w'"),
        ({"w": ("a", "b"), "x": ("a",), "y": ("b",)}, "'y'"),
        ({"w": ("a", LAYERS), "x": ("a",)}, "'w'"),
    ],
)
def test_wrong_axes_name_the_leaf(axes, message):
    with pytest.raises(ValueError, match=message):
        muon_clip(LR, axes=axes).init({"w": jnp.ones((2, 3)), "x": jnp.ones(2)})
