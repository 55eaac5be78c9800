"""Served weights: a released checkpoint's bytes and scales as they are, int8 by the book, the forward pass on both."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.errors import UserError
from kimi_jax.inference import cache
from kimi_jax.inference.forward import forward
from kimi_jax.inference.weights import FORMATS, abstract, held, read_served, serving_params
from kimi_jax.layers.quantized import Quantized
from tests.checkpoint.examples import BF16, CFG, FP8_CONFIG, quantised, random_params, random_tensors, save_hf, save_run

F32 = CFG.replace(dtype="float32", param_dtype="float32")


def leaf(params, path):
    for key in path:
        params = params[key]
    return params


def hf(params, entry) -> np.ndarray:
    """A served weight in f32, as the Hugging Face tensor."""
    w = np.asarray(leaf(params, entry.path).astype(jnp.float32))[entry.index]
    return w.reshape(entry.shape[::-1]).T if entry.inputs else w.reshape(entry.shape)


def is_quantised(w) -> bool:
    return isinstance(w, Quantized)


def dequantised(q: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    scale = np.repeat(np.repeat(scale, block[0], 0), block[1], 1)[: q.shape[0], : q.shape[1]]
    return q.astype(np.float32) * scale


@pytest.mark.parametrize("block", [(128, 128), (64, 64), (24, 40)])
def test_a_released_checkpoint_is_served_as_it_is(tmp_path, block):
    tensors = quantised(random_tensors(), block)
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    cfg, params = read_served(save_hf(tmp_path / "hf", tensors, **config), "fp8", dtype="float32")
    declared = abstract(F32, "fp8", block=block)
    assert cfg == F32 and jax.tree.structure(declared) == jax.tree.structure(params)
    arrays = [(a.shape, a.dtype) for a in jax.tree.leaves(params)]
    assert arrays == [(a.shape, a.dtype) for a in jax.tree.leaves(declared)]
    for entry in plan(CFG):
        stored = tensors[entry.name]
        if "_proj" not in entry.name:
            np.testing.assert_array_equal(hf(params, entry), stored.astype(np.float32))
            continue
        values = np.asarray(leaf(params, entry.path).values)[entry.index].reshape(entry.shape[::-1]).T
        assert values.tobytes() == stored.tobytes(), entry.name
        expected = dequantised(stored, tensors[entry.name + "_scale_inv"], block)
        np.testing.assert_array_equal(hf(params, entry), expected, err_msg=entry.name)


def test_int8_has_a_scale_for_every_output(tmp_path):
    tensors = quantised(random_tensors())
    _, params = read_served(save_hf(tmp_path / "hf", tensors, **FP8_CONFIG), "int8")
    for entry in plan(CFG):
        if "_proj" in entry.name:
            w = dequantised(tensors[entry.name], tensors[entry.name + "_scale_inv"], (128, 128))
            step = np.abs(w).max(axis=1, keepdims=True) / 127
            np.testing.assert_allclose(hf(params, entry), np.rint(w / step) * step, rtol=1e-6, err_msg=entry.name)
    scale = params["moe_layers"]["attn"]["o"].scale
    assert scale.shape == (2, 1, 1, CFG.hidden_size) and scale.dtype == jnp.float32


def test_fp8_of_other_weights_is_what_an_export_would_hold():
    params = random_params(BF16)
    served = serving_params(abstract(F32, "fp8"), F32, "fp8", held(params))
    for entry in plan(CFG):
        if "_proj" not in entry.name:
            continue
        w = entry.to_hf(leaf(params, entry.path)[entry.index]).astype(np.float32)
        rows, columns = (np.arange(n) // 128 for n in w.shape)
        found = hf(served, entry)
        for i, j in np.ndindex(rows[-1] + 1, columns[-1] + 1):
            at = np.ix_(rows == i, columns == j)
            scale = np.abs(w[at]).max() / np.float32(448)
            expected = (w[at] / scale).astype(jnp.float8_e4m3fn).astype(np.float32) * scale
            np.testing.assert_allclose(found[at], expected, rtol=1e-6, err_msg=entry.name)


@pytest.mark.parametrize("format", FORMATS)
def test_every_kind_of_checkpoint(tmp_path, format):
    hf, params = save_hf(tmp_path / "hf", quantised(random_tensors()), **FP8_CONFIG), random_params()
    from_hf(hf, tmp_path / "converted", "fp8")
    save_run(tmp_path / "run", params)
    for path, same in ((tmp_path / "converted", read_served(hf, format)[1]), (tmp_path / "run", None)):
        cfg, found = read_served(path, format)
        same = same or serving_params(abstract(cfg, format), cfg, format, held(params))
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(same), strict=True):
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)


def test_what_is_not_quantised():
    served = serving_params(abstract(CFG, "int8"), CFG, "int8", held(random_params()))
    for path in (["embedding"], ["lm_head"], ["norm"], ["moe_layers", "mlp_norm"], ["moe_layers", "attn", "q_norm"]):
        assert leaf(served, path).dtype == CFG.dtype
    router = served["moe_layers"]["moe"]["router"]
    assert router["weight"].dtype == CFG.param_dtype and router["bias"].dtype == jnp.float32


@pytest.mark.parametrize("format", [pytest.param("fp8", marks=pytest.mark.slow), "int8"])
def test_the_forward_pass_runs_on_them(format):
    served = serving_params(abstract(F32, format), F32, format, held(random_params()))
    plain = jax.tree.map(lambda w: w.astype(jnp.float32), served, is_leaf=is_quantised)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CFG.vocab_size, (2, 7)))
    rows = jnp.zeros(2, jnp.int32), jnp.asarray([7, 4]), jnp.asarray([[1], [2]])
    run = jax.jit(lambda params: forward(params, F32, cache.init(F32, 3, 8), tokens, *rows)[0])
    np.testing.assert_allclose(run(served), run(plain), rtol=1e-4, atol=1e-4)


def test_nan_is_refused():
    params = random_params()
    params["moe_layers"]["moe"]["experts"]["up"][1, 2, 3, 4] = np.nan
    for format in FORMATS:
        with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.experts\.2\.up_proj\.weight holds NaN"):
            serving_params(abstract(F32, format), F32, format, held(params))


def test_an_unknown_format_is_refused():
    with pytest.raises(UserError, match="bf16, fp8, int8, not in int3"):
        abstract(F32, "int3")
