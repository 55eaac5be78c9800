"""Ten steps of MuonClip and AdamW in float32 against float64 numpy, leaf by leaf."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kimi_jax import presets
from kimi_jax.dims import Fused, axes_of, map_specs
from kimi_jax.model import specs
from kimi_jax.optim import adamw, muon_clip
from tests.optim.reference import AdamW, Muon, error, flat, gaussian, newton_schulz, train

LR, DECAY, STEPS = 2e-2, 0.1, 10

CFG = presets.tiny().replace(
    vocab_size=26,
    hidden_size=20,
    intermediate_size=28,
    moe_intermediate_size=6,
    num_hidden_layers=3,
    num_attention_heads=3,
    n_routed_experts=4,
    num_experts_per_tok=2,
    q_lora_rank=14,
    kv_lora_rank=9,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
)
SPECS = specs(CFG)
AXES = axes_of(SPECS)
SHAPES = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), SPECS)

ADAM = {"embedding", "lm_head", "norm", "attn_norm", "mlp_norm", "q_norm", "kv_norm"}


def rule(path: str, split: bool, **muon) -> Muon | AdamW | None:
    """What should act on a leaf of the model, in words of its name alone; None: nothing."""
    *_, parent, name = ("", *path.split("/"))
    if path.endswith("router/bias"):
        return None
    if name in ADAM:
        return AdamW()
    stack = 2 if parent == "experts" else 1
    rows = 2 if name == "o" else 1  # heads and value dims are the rows of o; heads and their dims the columns of q_b
    cut = {"q_b": 6, "kv_b": 6, "kv_a": 9}.get(name) if split else None
    return Muon(stack, rows, (cut, None) if cut else (None,), **muon)


def run(optimizer, params, grads, **extra):
    @jax.jit
    def step(params, state, grad):
        updates, state = optimizer.update(grad, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for grad in grads:
        params, state = step(params, state, grad)
    return params, state


def assert_close(got, params, grads, rule_of):
    got, grads = flat(got), [flat(grad) for grad in grads]
    for path, weight in flat(params).items():
        found = rule_of(path)
        if found is None:
            np.testing.assert_array_equal(got[path], weight)
            continue
        want = train(found, weight, [grad[path] for grad in grads], LR, DECAY)
        assert error(got[path], want) <= 1e-5, (path, error(got[path], want))
        moved = want - np.asarray(weight, np.float64)  # a small update must not hide in a large weight
        assert error(np.asarray(got[path], np.float64) - weight, moved) <= 1e-4, path


def model_inputs(seed=0):
    return gaussian(SHAPES, seed, 0.3), [gaussian(SHAPES, seed + 1 + i) for i in range(STEPS)]


@pytest.mark.parametrize("nesterov, split", [(True, False), (False, True)])
def test_the_models_tree(nesterov, split):
    """Stacked layers, experts, merged heads, fused parts whole and split, gains, the router and its frozen bias."""
    params, grads = model_inputs()
    optimizer = muon_clip(
        LR, nesterov=nesterov, ns_dtype=jnp.float32, weight_decay=DECAY, tau=None, axes=AXES, split_fused=split
    )
    got, _ = run(optimizer, params, grads)
    assert_close(got, params, grads, lambda path: rule(path, split, nesterov=nesterov))


def test_adamw_on_the_models_tree():
    params, grads = model_inputs(50)
    got, _ = run(adamw(LR, weight_decay=DECAY, axes=AXES), params, grads)
    assert_close(got, params, grads, lambda path: None if path.endswith("router/bias") else AdamW())


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_plain_tree_without_axes(nesterov):
    """A 2-D leaf is a matrix unless its path names an embedding or a head; all else is AdamW's."""
    shapes = {
        "block": {"wide": (12, 20), "tall": (30, 7), "square": (9, 9), "bias": (20,), "conv": (2, 3, 4)},
        "token_embedding": {"weight": (11, 6)},
        "lm_head": {"kernel": (6, 11)},
        "scale": (),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    like = jax.tree.map(lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=is_shape)
    params, grads = gaussian(like, 0), [gaussian(like, 1 + i) for i in range(STEPS)]
    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    got, _ = run(muon_clip(LR, nesterov=nesterov, ns_dtype=jnp.float32, weight_decay=DECAY), params, grads)
    matrices = {"block/wide", "block/tall", "block/square"}
    assert_close(got, params, grads, lambda path: Muon(nesterov=nesterov) if path in matrices else AdamW())


def test_other_constants_and_a_schedule():
    """The rate is asked with the number of steps taken before: 0 at the first."""
    params = {"w": gaussian(jax.ShapeDtypeStruct((8, 12), jnp.float32), 0), "g": np.ones(5, np.float32)}
    grads = [gaussian(params, 1 + i) for i in range(4)]
    schedule = lambda count: 0.01 * (1.0 + count)  # noqa: E731
    constants = dict(momentum=0.7, ns_steps=5, rms=0.4, b1=0.8, b2=0.99, eps=1e-3)
    got, _ = run(muon_clip(schedule, ns_dtype=jnp.float32, weight_decay=0.3, **constants), params, grads)
    for name, found in (("w", Muon(momentum=0.7, rms=0.4)), ("g", AdamW(0.8, 0.99, 1e-3))):
        want = np.asarray(params[name], np.float64)
        for count, grad in enumerate(grads):
            want = train(found, want, [grad[name]], 0.01 * (1 + count), 0.3)
        assert error(got[name], want) <= 1e-5, name


@pytest.mark.parametrize(
    "shape, dtype", [((256, 512), "float32"), ((512, 256), "bfloat16"), ((2, 256, 512), "bfloat16")]
)
def test_update_rms(shape, dtype):
    """0.18 to 0.19 of the learning rate for Gaussian gradients at this aspect: AdamW's usual size."""
    params = {"w": jnp.zeros(shape)}
    axes = {"w": ("layers", "embed", "mlp")[-len(shape) :]}
    optimizer = muon_clip(1.0, weight_decay=0.0, axes=axes, ns_dtype=jnp.dtype(dtype))
    updates, _ = optimizer.update(gaussian(params, 0), optimizer.init(params), params)
    assert 0.18 <= float(jnp.sqrt(jnp.mean(updates["w"] ** 2))) <= 0.19


@pytest.mark.parametrize("n_layers", [1, 4, 7])
def test_experts_by_pieces(n_layers):
    """Whether or not the layers divide into pieces, every one moves, once, as it would alone."""
    params = {"w": gaussian(jax.ShapeDtypeStruct((n_layers, 2, 8, 5), jnp.float32), 0)}
    grads = [gaussian(params, 1 + i) for i in range(2)]
    optimizer = muon_clip(
        LR, axes={"w": ("layers", "experts", "embed", "mlp")}, ns_dtype=jnp.float32, weight_decay=DECAY
    )
    got, state = run(optimizer, params, grads)
    assert_close(got, params, grads, lambda path: Muon(stack=2))
    kept = 0.95 * np.asarray(grads[0]["w"], np.float64) + grads[1]["w"]
    assert error(state.momentum["w"], kept) < 1e-6


@pytest.mark.parametrize("params_dtype, grads_dtype", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_pieces_keep_the_better_of_two_dtypes(params_dtype, grads_dtype):
    """Neither the gradients nor the steps that take their place are rounded to the other's dtype."""
    like = {"w": jax.ShapeDtypeStruct((4, 2, 6, 9), jnp.float32)}
    params, grads = (jax.tree.map(jnp.asarray, gaussian(like, i)) for i in range(2))
    params, grads = params["w"].astype(params_dtype), grads["w"].astype(grads_dtype)
    optimizer = muon_clip(LR, axes=("layers", "experts", "embed", "mlp"), ns_dtype=jnp.float32, weight_decay=DECAY)
    updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
    weights = np.asarray(params, np.float64)
    want = train(Muon(stack=2), weights, [np.asarray(grads, np.float64)], LR, DECAY) - weights
    assert updates.dtype == params_dtype
    assert error(updates, want) <= (1e-5 if params_dtype == "float32" else 2e-3)  # rounded once


def test_momentum_kept_in_bfloat16():
    """Rounded once a step, when it is stored: the update is that of the momentum before."""
    params, grads = gaussian({"w": jnp.zeros((6, 9))}, 0), [gaussian({"w": jnp.zeros((6, 9))}, i) for i in (1, 2)]
    optimizer = muon_clip(LR, momentum_dtype=jnp.bfloat16, nesterov=False, ns_dtype=jnp.float32, weight_decay=0.0)
    w, state = run(optimizer, params, grads)
    assert state.momentum["w"].dtype == jnp.bfloat16
    first = np.asarray(jnp.asarray(grads[0]["w"]).astype(jnp.bfloat16), np.float64)
    directions = (np.asarray(grads[0]["w"], np.float64), 0.95 * first + grads[1]["w"])
    expected = params["w"] - LR * 0.2 * 3 * sum(newton_schulz(direction) for direction in directions)
    np.testing.assert_allclose(w["w"], expected, atol=1e-6)


def test_bfloat16_newton_schulz():
    """Close to exact per step, to some per cent, as eight bits allow."""
    params = {"w": gaussian(jax.ShapeDtypeStruct((48, 96), jnp.float32), 0)}
    grads = [gaussian(params, 1 + i) for i in range(STEPS)]
    got, _ = run(muon_clip(LR, weight_decay=0.0), params, grads)
    want = train(Muon(), params["w"], [grad["w"] for grad in grads], LR, 0.0)
    moved = np.asarray(got["w"], np.float64) - params["w"]
    assert error(moved, want - params["w"]) < 3.5e-2


def test_state_of_every_kind_of_leaf():
    """Matrices have one moment, the others two, buffers none; QK-Clip remembers a flag per layer and head."""
    state = jax.eval_shape(muon_clip(LR, axes=AXES).init, SHAPES)
    momentum, second = flat_state(state.momentum), flat_state(state.second)
    for path, spec in flat(SHAPES).items():
        found = rule(path, False)
        assert (path in momentum) == (found is not None), path
        assert (path in second) == isinstance(found, AdamW), path
        assert path not in momentum or momentum[path].shape == spec.shape
        assert path not in second or second[path].shape == spec.shape
    assert (state.ever_clipped.shape, state.ever_clipped.dtype) == ((3, 3), bool)
    assert (state.count.shape, state.count.dtype) == ((), jnp.int32)


def flat_state(tree) -> dict:
    return {path: leaf for path, leaf in flat(tree).items() if not isinstance(leaf, optax.MaskedNode)}


@pytest.mark.parametrize(
    "axes, named",
    [
        ({"a": ("embed", "mlp")}, "b"),  # no entry
        ({"a": ("embed", "mlp"), "b": ("embed",), "c": ("embed",)}, "c"),  # no such parameter
        ({"a": ("embed",), "b": ("embed",)}, "a"),  # too few names
        ({"a": ("layers", "embed", "mlp"), "b": ("embed",)}, "a"),  # too many
        ({"a": ("embed", Fused((("x", 2), ("y", 3)))), "b": ("embed",)}, "a"),  # parts of another size
        ({"a": ("embed", "mlp", "other"), "b": ("embed",)}, "a"),  # three sides
        ({"a": ("embed", "experts"), "b": ("embed",)}, "a"),  # a stack axis inside the matrix
    ],
)
def test_axes_that_do_not_fit_name_the_leaf(axes, named):
    params = {"a": jnp.ones((3, 4, 5) if "other" in axes["a"] else (3, 4)), "b": jnp.ones(3)}
    with pytest.raises(ValueError, match=rf"\['{named}'\]"):
        muon_clip(LR, axes=axes).init(params)


def test_a_bias_per_head_is_no_matrix():
    state = muon_clip(LR, axes={"bias": ("heads", "value")}).init({"bias": jnp.ones((3, 4))})
    assert state.second["bias"].shape == (3, 4)


@pytest.mark.parametrize(
    ("path", "is_matrix"),
    [
        ("multi_head_attention/w", True),
        ("MultiHeadAttention_0/w", True),
        ("Dense_0/kernel", True),
        ("lm_head/w", False),
        ("LMHead_0/Dense_0/kernel", False),  # as Flax names what has no name
        ("TokenEmbedding_0/table", False),
        ("tok_embeddings/weight", False),
        ("query/bias", False),  # [heads, width]
        ("layers/norm/scale", False),  # of stacked layers
    ],
)
def test_what_names_say(path, is_matrix):
    """Without axes: AdamW for embeddings, heads, gains and biases, and names are those of whole keys."""
    params: Any = jnp.ones((3, 4))
    for key in reversed(path.split("/")):
        params = {key: params}
    (found,) = jax.tree.leaves(muon_clip(LR).init(params).second, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
    assert isinstance(found, optax.MaskedNode) == is_matrix
