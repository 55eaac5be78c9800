"""QK-Clip on a small multi-head latent attention, whose logits are recomputed here in float64."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax.dims import Fused
from kimi_jax.optim import adamw, largest, muon_clip
from tests.optim.reference import Muon, clip, error, flat, gaussian, train

T, D, Q, C, N, H, R, W, TAU = 9, 12, 7, 8, 3, 6, 4, 5, 4.0
Q_PARTS, K_PARTS = (("nope", H), ("rope", R)), (("nope", H), ("value", W))
LAYERS = {"dense_layers": 1, "moe_layers": 2}  # rows 0 and 1..2 of the maxima
FIRST = {"dense_layers": 0, "moe_layers": 1}

ATTENTION = {
    "q_a": ((D, Q), ("embed", "q_lora")),
    "q_b": ((Q, N, H + R), ("q_lora", "heads", Fused(Q_PARTS))),
    "kv_a": ((D, C + R), ("embed", Fused((("latent", C), ("rope_key", R))))),
    "kv_b": ((C, N, H + W), ("kv_lora", "heads", Fused(K_PARTS))),
    "o": ((N, W, D), ("heads", "value", "embed")),
}
SHAPES = {
    stack: {"attn": {k: jax.ShapeDtypeStruct((n, *shape), jnp.float32) for k, (shape, _) in ATTENTION.items()}}
    for stack, n in LAYERS.items()
}
AXES = {stack: {"attn": {k: ("layers", *axes) for k, (_, axes) in ATTENTION.items()}} for stack in LAYERS}


def rotated(x_TR: np.ndarray) -> np.ndarray:
    """Each pair turned by an angle that depends on the position."""
    angle = np.arange(T)[:, None] * 0.7 ** np.arange(R // 2)
    z = (x_TR[:, 0::2] + 1j * x_TR[:, 1::2]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=-1)


def attention(attn: dict, layer: int, x_TD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The largest causal logit of every head of one layer, and the values [T, N, W]."""
    w = {name: np.asarray(leaf[layer], np.float64) for name, leaf in attn.items()}
    q_TNX = np.einsum("TD,DQ,QNX->TNX", x_TD, w["q_a"], w["q_b"])
    latent_TC, rope_key_TR = np.split(x_TD @ w["kv_a"], [C], axis=-1)
    kv_TNX = np.einsum("TC,CNX->TNX", latent_TC, w["kv_b"])
    maxima = []
    for n in range(N):
        logits = q_TNX[:, n, :H] @ kv_TNX[:, n, :H].T + rotated(q_TNX[:, n, H:]) @ rotated(rope_key_TR).T
        maxima.append((logits / np.sqrt(H + R))[np.tril_indices(T)].max())
    return np.array(maxima), kv_TNX[..., H:]


def all_logits(params: dict, x_TD: np.ndarray) -> np.ndarray:
    """[L, N]: the dense layer, then the others."""
    return np.stack([attention(params[s]["attn"], i, x_TD)[0] for s, n in LAYERS.items() for i in range(n)])


PARAMS = gaussian(SHAPES, 34, 0.45)
X_TD = np.random.default_rng(1).standard_normal((T, D))
OLD_LN = all_logits(PARAMS, X_TD)
GRADS = gaussian(SHAPES, 2)


def one_update(tau, max_logits_LN, lr=1e-2, make=adamw):
    """Updates and the state of one compiled update."""
    optimizer = make(lr, tau=tau, axes=AXES)

    @jax.jit
    def step(params, grads, max_logits_LN):
        return optimizer.update(grads, optimizer.init(params), params, max_logits=max_logits_LN)

    return step(PARAMS, GRADS, jnp.asarray(max_logits_LN, jnp.float32))


def one_step(tau, max_logits_LN, lr):
    """New weights and the state."""
    updates, state = one_update(tau, max_logits_LN, lr)
    return optax.apply_updates(PARAMS, updates), state


def test_the_setting_tells_layers_and_heads_apart():
    over = OLD_LN > TAU
    assert [row.any() and not row.all() for row in over] == [True] * 3, OLD_LN
    assert len({tuple(row) for row in over}) > 1
    assert len(np.unique(np.round(OLD_LN, 3))) == OLD_LN.size


def test_every_head_ends_at_the_smaller_of_old_and_tau():
    new, state = one_step(TAU, OLD_LN, lr=0.0)
    np.testing.assert_allclose(all_logits(new, X_TD), np.minimum(OLD_LN, TAU), rtol=1e-4)
    np.testing.assert_array_equal(state.ever_clipped, OLD_LN > TAU)
    for stack, n in LAYERS.items():
        attn, old = new[stack]["attn"], PARAMS[stack]["attn"]
        for name in ("q_a", "kv_a", "o"):  # kv_a holds the shared rotary key
            np.testing.assert_array_equal(attn[name], old[name])
        for layer in range(n):
            np.testing.assert_array_equal(attention(attn, layer, X_TD)[1], attention(old, layer, X_TD)[1])
            for head in np.flatnonzero(OLD_LN[FIRST[stack] + layer] <= TAU):
                for name in ("q_b", "kv_b"):
                    np.testing.assert_array_equal(attn[name][layer, :, head], old[name][layer, :, head])


@pytest.mark.parametrize("make", [functools.partial(muon_clip, ns_steps=1), adamw], ids=["muon_clip", "adamw"])
def test_only_clipped_heads_differ_from_a_run_without_the_clip(make):
    """Their updates, bit for bit; the weights of a clipped head are the free one's times its scale."""
    clipped, _ = one_update(TAU, OLD_LN, make=make)
    free, state = one_update(None, OLD_LN, make=make)
    assert not np.any(state.ever_clipped)
    clipped, free, params = flat(clipped), flat(free), flat(PARAMS)
    for path, leaf in free.items():
        stack, _, name = path.split("/")
        if name not in ("q_b", "kv_b"):
            np.testing.assert_array_equal(clipped[path], leaf, path)
            continue
        rows = OLD_LN[FIRST[stack] :][: LAYERS[stack]]
        stepped = params[path].astype(np.float64) + np.asarray(leaf)
        want = clip(stepped, rows, TAU, Q_PARTS if name == "q_b" else K_PARTS)
        assert error(params[path] + clipped[path], want) < 1e-6, path
        for layer, head in np.argwhere(rows <= TAU):
            np.testing.assert_array_equal(clipped[path][layer, :, head], leaf[layer, :, head], path)
        if name == "kv_b":
            np.testing.assert_array_equal(clipped[path][..., H:], leaf[..., H:], path)


def test_ten_steps_equal_the_reference():
    """The clip acts on the stepped weights, every step, with that step's maxima."""
    rng, steps = np.random.default_rng(3), 10
    maxima = (TAU * rng.uniform(0.3, 2.0, (steps, 3, N))).astype(np.float32)
    grads = [gaussian(SHAPES, 10 + i) for i in range(steps)]
    optimizer = muon_clip(0.02, tau=TAU, axes=AXES, ns_dtype=jnp.float32)

    @jax.jit
    def step(params, state, grad, max_logits_LN):
        updates, state = optimizer.update(grad, state, params, max_logits=max_logits_LN)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, optimizer.init(PARAMS)
    for grad, row in zip(grads, maxima, strict=True):
        params, state = step(params, state, grad, row)
    np.testing.assert_array_equal(state.ever_clipped, (maxima > TAU).any(axis=0))
    got, grads = flat(params), [flat(grad) for grad in grads]
    for path, weight in flat(PARAMS).items():
        stack, _, name = path.split("/")
        after = lambda t, w: w  # noqa: E731
        if name in ("q_b", "kv_b"):
            parts, rows = Q_PARTS if name == "q_b" else K_PARTS, maxima[:, FIRST[stack] :][:, : LAYERS[stack]]
            after = lambda t, w, parts=parts, rows=rows: clip(w, rows[t], TAU, parts)  # noqa: E731
        rule = Muon(1, 2 if name == "o" else 1)
        assert error(got[path], train(rule, weight, [grad[path] for grad in grads], 0.02, 0.1, after)) <= 1e-5, path


def test_layers_that_are_not_stacked():
    """One attention block per layer, each without a leading axis; the rows follow the tree. No query latent here."""
    spec = {"q": ("embed", "heads", Fused(Q_PARTS)), "kv_b": ("kv_lora", "heads", Fused(K_PARTS))}
    axes = {"layer_0": spec, "layer_1": spec, "norm": ("embed",)}
    shapes = {"q": (D, N, H + R), "kv_b": (C, N, H + W)}
    block = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    params = gaussian({"layer_0": block, "layer_1": block, "norm": jax.ShapeDtypeStruct((D,), jnp.float32)}, 4)
    maxima = np.float32([[1, 8, 16], [8, 2, 4]])
    optimizer = adamw(0.0, tau=TAU, axes=axes)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params, max_logits=maxima)
    got = optax.apply_updates(params, updates)
    for row, layer in enumerate(("layer_0", "layer_1")):
        for name, parts in (("q", Q_PARTS), ("kv_b", K_PARTS)):
            want = clip(params[layer][name][None].astype(np.float64), maxima[row : row + 1], TAU, parts)[0]
            np.testing.assert_allclose(got[layer][name], want, rtol=1e-5, atol=1e-6)


def test_accumulation_takes_the_largest_of_the_microbatches():
    xs = [scale * np.random.default_rng(seed).standard_normal((T, D)) for seed, scale in enumerate((0.9, 1.1, 1.0))]
    parts = [all_logits(PARAMS, x) for x in xs]
    whole = np.max(parts, axis=0)
    assert all((whole > part).any() and (whole == part).any() for part in parts)  # each holds some of the maxima
    together = jax.jit(largest)(*(jnp.asarray(part, jnp.float32) for part in parts))
    np.testing.assert_array_equal(together, whole.astype(np.float32))
    np.testing.assert_array_equal(largest(together), together)
    new, _ = one_step(TAU, together, lr=0.0)
    after = np.max([all_logits(new, x) for x in xs], axis=0)
    np.testing.assert_allclose(after, np.minimum(whole, TAU), rtol=1e-4)


def test_ever_clipped_accumulates():
    optimizer = adamw(1e-3, tau=TAU, axes=AXES)
    state, update = optimizer.init(PARAMS), jax.jit(optimizer.update)
    for row in (0, 2, 1):
        maxima = np.full((3, N), TAU, np.float32)  # at the threshold is not above it
        maxima[row, 1] = 2 * TAU if row != 1 else TAU
        _, state = update(GRADS, state, PARAMS, max_logits=maxima)
    assert np.argwhere(state.ever_clipped).tolist() == [[0, 1], [2, 1]]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_maximum_that_is_not_finite_clips_nothing(value):
    maxima = OLD_LN.copy()
    maxima[1, 2] = value
    new, state = one_step(TAU, maxima, lr=0.0)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(new))
    assert not state.ever_clipped[1, 2]
    for name in ("q_b", "kv_b"):
        old = PARAMS["moe_layers"]["attn"][name]
        np.testing.assert_array_equal(new["moe_layers"]["attn"][name][0, :, 2], old[0, :, 2])


def test_missing_or_misshapen_maxima_raise():
    optimizer = adamw(1e-3, tau=TAU, axes=AXES)
    state = optimizer.init(PARAMS)
    with pytest.raises(ValueError, match="max_logits"):
        optimizer.update(GRADS, state, PARAMS)
    for bad in ((2, N), (3, N - 1), (N,), (3, N, 1), (1, N)):
        with pytest.raises(ValueError, match=r"max_logits.*\(3, 3\)"):
            optimizer.update(GRADS, state, PARAMS, max_logits=jnp.ones(bad))
    free = adamw(1e-3, axes=AXES)
    jax.eval_shape(free.update, GRADS, state, PARAMS)  # without the clip there is nothing to miss


def test_siblings_must_agree():
    params = {"q": jnp.ones((4, 2, 6)), "k": jnp.ones((4, 3, 6))}
    axes = {name: ("embed", "heads", Fused((("nope", 6),))) for name in params}
    with pytest.raises(ValueError, match=r"\['q'\].*heads"):
        muon_clip(1e-3, tau=TAU, axes=axes).init(params)


@pytest.mark.parametrize("leaf", [lambda w: w, lambda w: {"kernel": w}, lambda w: {"weight": w}])
def test_layers_that_are_not_stacked_count_by_their_numbers(leaf):
    """Sorted as text, "layer_10" would come before "layer_2" and be clipped in its place."""
    names, sharp = [f"layer_{i}" for i in range(12)], 2
    params = {name: {"query": leaf(jnp.ones((3, 1, 2))), "key": leaf(jnp.ones((3, 1, 2)))} for name in names}
    axes = jax.tree.map(lambda _: ("embed", "heads", Fused((("nope", 2),))), params)
    optimizer = adamw(0.0, tau=TAU, axes=axes)
    maxima = jnp.ones((12, 1)).at[sharp].set(4 * TAU)
    updates, _ = optimizer.update(params, optimizer.init(params), params, max_logits=maxima)
    for name in names:
        for update in jax.tree.leaves(updates[name]):
            np.testing.assert_allclose(update, -0.5 if name == f"layer_{sharp}" else 0.0, rtol=1e-6)
