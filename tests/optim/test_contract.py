"""What optax expects of a transform, and this package of its own: one suite for the whole family."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from kimi_jax.dims import Fused
from kimi_jax.optim import adamw, muon_clip
from tests.optim.reference import error, flat, gaussian

LR, DECAY = 2.0**-3, 2.0**-4  # powers of two: 1 - LR * DECAY and its products round once
MAXIMA = np.float32([[1, 9]])
AXES = {
    "attn": {
        "q_b": ("layers", "q_lora", "heads", Fused((("nope", 4), ("rope", 2)))),
        "norm": ("layers", "q_lora"),
    },
    "experts": ("layers", "experts", "embed", "expert_mlp"),
    "bias": ("layers", "router_bias"),
    "embedding": ("vocab", "embed"),
}
SHAPES = {"attn": {"q_b": (1, 5, 2, 6), "norm": (1, 5)}, "experts": (1, 3, 6, 4), "bias": (1, 3), "embedding": (7, 6)}
LIKE = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))

FAMILY = {
    "muon_clip": functools.partial(muon_clip, tau=3.0, axes=AXES, ns_dtype=jnp.float32, ns_steps=2),
    "muon_clip_split": functools.partial(
        muon_clip, tau=3.0, axes=AXES, ns_dtype=jnp.float32, ns_steps=2, split_fused=True
    ),
    "muon": functools.partial(muon_clip, tau=None, ns_dtype=jnp.float32, ns_steps=2),  # no axes: any tree
    "adamw": functools.partial(adamw),
    "adamw_clip": functools.partial(adamw, tau=3.0, axes=AXES),
}


@pytest.fixture(params=FAMILY, scope="module")
def make(request):
    return FAMILY[request.param]


@pytest.fixture(scope="module")
def compiled(make):
    """The optimizer and its update, compiled once for the module."""
    optimizer = make(LR, weight_decay=DECAY)
    return optimizer, jax.jit(optimizer.update)


def inputs(dtype=jnp.float32):
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (gaussian(LIKE, 0, 0.5), gaussian(LIKE, 1)))


def form(tree):
    return jax.tree.map(lambda x: (x.shape, jnp.dtype(x.dtype)), tree)


def test_jit_equals_eager(compiled):
    optimizer, update = compiled
    params, grads = inputs()
    state = optimizer.init(params)
    eager, after = optimizer.update(grads, state, params, max_logits=MAXIMA)
    jitted, jitted_after = update(grads, state, params, max_logits=MAXIMA)
    assert jax.tree.structure((eager, after)) == jax.tree.structure((jitted, jitted_after))
    for a, b in zip(jax.tree.leaves((eager, after)), jax.tree.leaves((jitted, jitted_after)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("params_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("grads_dtype", [jnp.float32, jnp.bfloat16])
def test_updates_are_like_params_and_the_state_keeps_its_form(make, params_dtype, grads_dtype):
    """Shapes alone; also what ``jax.eval_shape`` and ``lax.scan`` need."""
    optimizer = make(lambda count: LR / (1 + count))
    params, grads = inputs(params_dtype)[0], inputs(grads_dtype)[1]
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, grads, state, params, max_logits=MAXIMA)
    assert form(updates) == form(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert form(after) == form(state)


def test_zero_gradient_decays_and_no_more(make, compiled):
    """p (1 - lr wd), exactly; a buffer stays. Without axes the bias is like any other leaf."""
    optimizer, update = compiled
    params, _ = inputs()
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = update(zero, optimizer.init(params), params, max_logits=jnp.zeros_like(MAXIMA))
    got = flat(optax.apply_updates(params, updates))
    for path, weight in flat(params).items():
        frozen = path == "bias" and "axes" in make.keywords
        want = np.asarray(weight, np.float64) * (1.0 if frozen else 1 - LR * DECAY)
        np.testing.assert_array_equal(got[path], want.astype(np.float32), path)


def test_buffers_are_never_touched(make, compiled):
    if "axes" in make.keywords:
        optimizer, update = compiled
        params, grads = inputs()
        updates, state = update(grads, optimizer.init(params), params, max_logits=MAXIMA)
        assert not updates["bias"].any() and updates["experts"].any()
        assert jax.tree.leaves((state.momentum["bias"], state.second["bias"])) == []


def test_in_a_chain_with_donation(make, compiled):
    """``max_logits`` passes through ``optax.chain``; state and weights may be donated; gradients arrive clipped."""
    params, grads = inputs()
    norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    optimizer, update = compiled
    want, _ = update(jax.tree.map(lambda g: g / norm, grads), optimizer.init(params), params, max_logits=MAXIMA)
    chain = optax.chain(optax.clip_by_global_norm(1.0), make(LR, weight_decay=DECAY))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = chain.update(grads, state, params, max_logits=MAXIMA)
        return optax.apply_updates(params, updates), state

    want = flat(optax.apply_updates(params, want))
    state = chain.init(params)
    form_before = form(state)
    params, state = step(params, state, grads)
    for path, leaf in flat(params).items():
        assert error(leaf, np.asarray(want[path], np.float64)) < 1e-5, path
    assert form(state) == form_before
    params, state = step(params, state, grads)
    assert int(state[1].count) == 2


def test_finds_the_minimum(make):
    """Half of ||p - target||^2, with a rate that falls to zero; the frozen buffer has nothing to find."""
    params, target = inputs()
    steps = 200
    optimizer = make(optax.linear_schedule(0.4, 0.0, steps), weight_decay=0.0)

    @jax.jit
    def train(params):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(jnp.subtract, params, target)
            updates, state = optimizer.update(grads, state, params, max_logits=jnp.zeros_like(MAXIMA))
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0]

    found = flat(train(params))
    for path, want in flat(target).items():
        if path != "bias" or "axes" not in make.keywords:
            assert error(found[path], np.asarray(want, np.float64)) < 0.05, path


def test_parameters_are_required(make):
    params, grads = inputs()
    optimizer = make(LR)
    with pytest.raises(ValueError, match="parameters"):
        optimizer.update(grads, optimizer.init(params), max_logits=MAXIMA)


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_trees_and_leaves_without_elements(name):
    optimizer = FAMILY[name](LR)
    for shapes in ({}, {"a": (0, 4), "b": (4, 0), "c": (0,), "d": ()}):
        params = {key: jnp.zeros(shape) for key, shape in shapes.items()}
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert jax.tree.map(jnp.shape, updates, is_leaf=lambda x: False) == shapes


def test_gradients_of_another_structure_are_refused(make):
    """Leaves are never paired by position alone."""
    params, grads = inputs()
    grads["embeddings"] = grads.pop("embedding")
    optimizer = make(LR)
    with pytest.raises(ValueError, match="embedding"):
        optimizer.update(grads, optimizer.init(params), params, max_logits=MAXIMA)


def test_state_survives_orbax(compiled, tmp_path):
    optimizer, update = compiled
    params, grads = inputs()
    _, state = update(grads, optimizer.init(params), params, max_logits=MAXIMA)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", jax.eval_shape(optimizer.init, params))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@pytest.mark.parametrize(
    "optimizer", [muon_clip(LR, ns_dtype=jnp.float32, ns_steps=2), adamw(LR)], ids=["muon_clip", "adamw"]
)
def test_under_masked(optimizer):
    """``optax.masked`` hides leaves behind MaskedNode: what is left moves as it would alone."""
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(2), "c": jnp.ones((4, 3))}
    masked = optax.masked(optimizer, {"a": True, "b": True, "c": False})
    updates, _ = masked.update(params, masked.init(params), params)
    alone = {"a": params["a"], "b": params["b"]}
    want, _ = optimizer.update(alone, optimizer.init(alone), alone)
    np.testing.assert_array_equal(updates["a"], want["a"])
    np.testing.assert_array_equal(updates["b"], want["b"])
    np.testing.assert_array_equal(updates["c"], params["c"])


def test_empty_nodes_and_masks_with_axes():
    """What is hidden, or never was a parameter, needs no axes and may have them; two groups act as one would."""
    params, grads = inputs()
    plain = {"attn", "experts"}
    wanted_optimizer = FAMILY["muon_clip"](LR, weight_decay=0.0)
    want, _ = wanted_optimizer.update(grads, wanted_optimizer.init(params), params, max_logits=MAXIMA)
    group = FAMILY["muon_clip"](LR, weight_decay=0.0)
    labels = {key: jax.tree.map(lambda _, key=key: key in plain, params[key]) for key in params}
    labels["none"], params["none"], grads["none"] = (), (), ()
    both = optax.multi_transform({True: group, False: adamw(LR, axes=AXES, weight_decay=0.0)}, labels)
    updates, _ = both.update(grads, both.init(params), params, max_logits=MAXIMA)
    assert updates.pop("none") == ()
    jax.tree.map(np.testing.assert_array_equal, updates, want)


@pytest.mark.parametrize("hide", ["masked", "None"])
def test_whole_parts_may_be_hidden(hide):
    """By a mask that names a part and not its leaves, or by None in its place: the axes of all that still fit."""
    params, grads = inputs()
    whole, kept = FAMILY["muon_clip"](LR), {"experts", "embedding"}
    want, _ = whole.update(grads, whole.init(params), params, max_logits=MAXIMA)
    if hide == "masked":
        optimizer = optax.masked(whole, {key: key in kept for key in params})
    else:
        optimizer = whole
        params, grads = ({key: tree[key] if key in kept else None for key in tree} for tree in (params, grads))
    updates, _ = optimizer.update(grads, optimizer.init(params), params, max_logits=MAXIMA)
    for key in kept:
        np.testing.assert_array_equal(updates[key], want[key])


def test_nnx_optimizer_with_axes():
    """It makes the state from Flax's variables and updates with what they hold."""

    class Attention(nnx.Module):
        def __init__(self):
            self.query, self.key = (nnx.Param(jnp.ones((3, 2, 4))) for _ in range(2))

    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([Attention() for _ in range(12)])

    model, names = Model(), ("embed", "heads", Fused((("nope", 4),)))
    zero = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    axes = jax.tree.map(lambda _: names, zero)
    optimizer = nnx.Optimizer(model, muon_clip(LR, tau=3.0, weight_decay=0.0, axes=axes), wrt=nnx.Param)
    optimizer.update(model, zero, max_logits=jnp.ones((12, 2)).at[2, 1].set(12.0))
    for i, layer in enumerate(model.layers):
        for found in (layer.query[...], layer.key[...]):
            want = np.ones((3, 2, 4))
            want[:, 1] *= 0.5 if i == 2 else 1.0
            np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("make_any", [muon_clip, adamw])
def test_the_rate_can_be_injected(make_any):
    """``optax.inject_hyperparams``: the usual way to change a rate during a run."""
    params, grads = {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}, {"w": jnp.ones((3, 4)), "b": jnp.ones(2)}
    injected = optax.inject_hyperparams(make_any)(learning_rate=LR)
    state = injected.init(params)
    state.hyperparams["learning_rate"] *= 2
    updates, _ = jax.jit(injected.update)(grads, state, params)
    plain = make_any(2 * LR)
    want, _ = jax.jit(plain.update)(grads, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, want)
