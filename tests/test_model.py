"""The whole model: its parameters, packed documents, recomputation and statistics."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.dims import is_spec, map_specs
from kimi_jax.errors import UserError
from kimi_jax.model import KimiK2, in_compute_dtype, init_params, lookup, parameter_count, specs
from tests import tiny
from tests.tiny import parameters

CFG = tiny.CFG.replace(experts="ragged")
VARIANTS = {
    "base": CFG,
    "no dense layers": CFG.replace(first_k_dense_replace=0),
    "dense layers alone": CFG.replace(first_k_dense_replace=3),
    "no shared experts": CFG.replace(n_shared_experts=0),
    "three shared experts": CFG.replace(n_shared_experts=3, first_k_dense_replace=2),
    "no query latent": CFG.replace(q_lora_rank=None),
    "bfloat16": CFG.replace(dtype="bfloat16", param_dtype="bfloat16", experts="fastest"),
}


def shapes(cfg):
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    return jax.eval_shape(lambda tokens: KimiK2(cfg).init(jax.random.key(0), tokens)["params"], tokens)


def test_a_trillion_parameters():
    cfg = presets.kimi_k2_1t()
    found = shapes(cfg)
    assert jax.tree.map(lambda a: a.shape, found) == map_specs(lambda spec: spec.shape, specs(cfg))
    biases = found["moe_layers"]["moe"]["router"]["bias"]
    assert biases.shape == (60, 384) and biases.dtype == jnp.float32
    assert sum(a.size for a in jax.tree.leaves(found)) - biases.size == parameter_count(cfg) == 1_026_408_209_408


@pytest.mark.parametrize("name", VARIANTS)
def test_init_makes_what_specs_declare(name):
    cfg = VARIANTS[name]
    declared = map_specs(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32 if spec.is_buffer else cfg.param_dtype), specs(cfg)
    )
    assert shapes(cfg) == declared
    assert ("dense_layers" in declared) == (cfg.first_k_dense_replace > 0)
    assert ("moe_layers" in declared) == (cfg.n_moe_layers > 0)


def by_flax(cfg):
    return KimiK2(cfg).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


@pytest.mark.parametrize("init", [partial(init_params, seed=0), pytest.param(by_flax, marks=pytest.mark.slow)])
def test_initial_values(init):
    params = jax.jit(init, static_argnums=0)(CFG)
    for spec, w in zip(jax.tree.leaves(specs(CFG), is_leaf=is_spec), jax.tree.leaves(params), strict=True):
        w = np.asarray(w)
        if spec.std is None:
            assert (w == spec.fill).all()
        else:
            assert np.std(w) == pytest.approx(spec.std, rel=0.15) and np.abs(w).max() <= 3.001 * spec.std
    gate = params["moe_layers"]["moe"]["experts"]["gate"]
    assert len({float(w) for w in gate[:, :, 0, 0].reshape(-1)}) == gate.shape[0] * gate.shape[1]  # none drawn twice


def test_compute_dtype_of_weights():
    cfg = VARIANTS["bfloat16"].replace(param_dtype="float32")
    params = parameters(cfg)
    cast = in_compute_dtype(cfg, params)
    router = cast["moe_layers"]["moe"].pop("router")
    assert {a.dtype for a in jax.tree.leaves(router)} == {jnp.dtype("float32")}
    assert {a.dtype for a in jax.tree.leaves(cast)} == {jnp.dtype("bfloat16")}


class Packed:
    """Row 0: two documents and padding; rows 1 and 2: each document alone, padded with something else."""

    first, second = (np.random.default_rng(i).integers(0, 61, length) for i, length in enumerate((5, 8)))
    tokens, positions, segments = (np.zeros((3, 16), np.int32) for _ in range(3))
    tokens[0, :13] = [*first, *second]
    positions[0, :13] = [*range(5), *range(8)]
    segments[0, :13] = [1] * 5 + [2] * 8
    for row, document in ((1, first), (2, second)):
        tokens[row] = 60
        tokens[row, : len(document)] = document
        positions[row] = np.arange(16)
        segments[row, : len(document)] = 7


@pytest.fixture(scope="module")
def packed():
    model = KimiK2(CFG)
    arrays = (jnp.asarray(a) for a in (Packed.tokens, Packed.positions, Packed.segments))
    logits, stats = jax.jit(lambda p, *a: model.apply({"params": p}, *a, stats=True))(parameters(CFG), *arrays)
    return np.asarray(logits), jax.tree.map(np.asarray, stats)


def test_packed_documents_do_not_see_each_other(packed):
    logits, _ = packed
    assert logits.dtype == np.float32 and logits.shape == (3, 16, 61)
    np.testing.assert_allclose(logits[0, :5], logits[1, :5], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[0, 5:13], logits[2, :8], rtol=1e-5, atol=1e-5)
    assert np.abs(logits[0, 5:10] - logits[1, 5:10]).max() > 0.1


def test_defaults_are_one_document_from_position_zero(packed):
    logits, _ = packed
    alone = jax.jit(KimiK2(CFG).apply)({"params": parameters(CFG)}, jnp.asarray(Packed.second)[None])
    np.testing.assert_allclose(alone[0], logits[2, :8], rtol=1e-5, atol=1e-5)


def test_stats(packed):
    _, stats = packed
    assert stats.max_logits_LN.shape == (3, 2) and stats.max_logits_LN.dtype == np.float32
    assert stats.load_LE.shape == (2, 6) and stats.load_LE.dtype == np.float32
    assert stats.experts_LBTK.shape == (2, 3, 16, 2) and stats.balance_loss.shape == ()
    for layer in range(2):
        chosen = stats.experts_LBTK[layer][Packed.segments > 0]
        np.testing.assert_array_equal(stats.load_LE[layer], [(chosen == e).sum() for e in range(6)])


@pytest.mark.parametrize("name", ["no dense layers", "dense layers alone"])
def test_stats_of_one_kind_of_layer(name):
    cfg = VARIANTS[name]
    tokens = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    _, stats = jax.eval_shape(lambda t: KimiK2(cfg).apply({"params": parameters(cfg)}, t, stats=True), tokens)
    assert stats.max_logits_LN.shape == (3, 2) and stats.load_LE.shape == (cfg.n_moe_layers, 6)
    assert stats.balance_loss.shape == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_the_table_is_added_up_in_float32(dtype):
    """256 + 1 is 256 in bf16, from either end."""
    tokens = jnp.zeros((1, 8), jnp.int32)
    dy = jnp.ones((1, 8, 4), jnp.bfloat16).at[0, jnp.array([0, -1])].set(256)
    _, pullback = jax.vjp(lambda table: lookup(table, tokens, jnp.bfloat16), jnp.ones((3, 4), dtype))
    np.testing.assert_array_equal(pullback(dy)[0], jnp.asarray([[518], [0], [0]], dtype) * jnp.ones(4, dtype))


def loss_and_gradients(cfg):
    tokens, positions, segments = (jnp.asarray(a) for a in (Packed.tokens, Packed.positions, Packed.segments))

    def loss(params):
        logits, stats = KimiK2(cfg).apply({"params": params}, tokens, positions, segments, stats=True)
        nll = -jax.nn.log_softmax(logits)[..., 3]
        return jnp.mean(jnp.where(segments > 0, nll, 0)) + stats.balance_loss

    return jax.jit(jax.value_and_grad(loss))(parameters(cfg))


@pytest.fixture(scope="module")
def without_remat():
    return loss_and_gradients(CFG)


@pytest.mark.parametrize("remat", ["full", *(pytest.param(r, marks=pytest.mark.slow) for r in ("dots", "offload"))])
def test_recomputation_changes_nothing(remat, without_remat):
    found = loss_and_gradients(CFG.replace(remat=remat))
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(without_remat), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6 * np.abs(theirs).max())
    assert not np.asarray(found[1]["moe_layers"]["moe"]["router"]["bias"]).any()


@pytest.mark.parametrize(("field", "known"), [("remat", "none, dots, full, offload"), ("experts", "fastest, blocked")])
def test_unknown_choices(field, known):
    with pytest.raises(UserError, match=f"unknown model.{field} 'most'; there are {known}"):
        shapes(CFG.replace(**{field: "most"}))
