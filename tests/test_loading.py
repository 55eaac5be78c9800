"""Hugging Face directories of any layout load exactly; damaged ones fail with one clear line."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import kimi_jax
from kimi_jax import presets
from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.checkpoint.manager import FOLDER, Checkpoints
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.config import ModelConfig
from kimi_jax.dims import is_spec
from kimi_jax.errors import UserError
from kimi_jax.loading import tokenizer_of
from kimi_jax.model import specs

BF16, FP8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
CFG = presets.tiny().replace(
    vocab_size=40, hidden_size=36, intermediate_size=20, moe_intermediate_size=12, n_routed_experts=4,
    num_experts_per_tok=2, num_hidden_layers=3, num_attention_heads=2, kv_lora_rank=10, q_lora_rank=14,
    qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, n_shared_experts=2,
)  # fmt: skip
UP = "model.layers.2.mlp.experts.3.up_proj.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def random_tensors(cfg: ModelConfig = CFG, dtype=np.float32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tensors = {e.name: rng.standard_normal(e.shape, np.float32) for e in plan(cfg)}
    return {name: w if name.endswith("bias") else w.astype(dtype) for name, w in tensors.items()}


def save(folder: Path, tensors: dict[str, np.ndarray], cfg: ModelConfig = CFG, **config) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg.to_hf() | config))
    write_file(folder / "model.safetensors", tensors)
    return folder


def quantised(tensors: dict[str, np.ndarray], block: int) -> dict[str, np.ndarray]:
    """Projections as random fp8 with random scales for every block."""
    rng = np.random.default_rng(1)
    found = {}
    for name, w in tensors.items():
        if "_proj" in name:
            found[name] = w.astype(FP8)
            shape = [-(-n // block) for n in w.shape]
            found[name + "_scale_inv"] = rng.uniform(0.5, 2, shape).astype(np.float32)
        else:
            found[name] = w if name.endswith("bias") else w.astype(BF16)
    return found


def leaf(params, path: str) -> np.ndarray:
    for key in path.split("."):
        params = params[key]
    return np.asarray(params)


def test_values_and_shapes(tmp_path):
    tensors = random_tensors()
    model, params = kimi_jax.load(save(tmp_path, tensors))
    assert model.cfg == CFG.replace(dtype="float32", param_dtype="float32", remat="none")
    declared = jax.tree.map(lambda s: s.shape, specs(CFG), is_leaf=is_spec)
    assert jax.tree.map(lambda w: w.shape, params) == declared
    np.testing.assert_array_equal(leaf(params, "embedding"), tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(leaf(params, "lm_head"), tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(leaf(params, "moe_layers.moe.experts.up")[1, 3], tensors[UP].T)
    np.testing.assert_array_equal(leaf(params, "moe_layers.moe.router.bias")[0], tensors[BIAS])
    q_b = tensors["model.layers.0.self_attn.q_b_proj.weight"].reshape(2, 10, 14)
    np.testing.assert_array_equal(leaf(params, "dense_layers.attn.q_b")[0], np.moveaxis(q_b, 2, 0))
    o = tensors["model.layers.2.self_attn.o_proj.weight"].reshape(36, 2, 8)
    np.testing.assert_array_equal(leaf(params, "moe_layers.attn.o")[1], np.moveaxis(o, 0, 2))


@pytest.mark.parametrize(
    "stored, asked, expected",
    [
        (np.float32, None, "float32"),
        (BF16, None, "bfloat16"),
        (np.float16, None, "float32"),
        (np.float32, "bfloat16", "bfloat16"),
        (BF16, np.float32, "float32"),
        (BF16, jnp.bfloat16, "bfloat16"),
        (np.float32, np.dtype("float32"), "float32"),
    ],
)
def test_dtypes(tmp_path, stored, asked, expected):
    tensors = random_tensors(dtype=stored)
    model, params = kimi_jax.load(save(tmp_path, tensors), dtype=asked)
    assert (model.cfg.dtype, model.cfg.param_dtype) == (expected, expected)
    bias = params["moe_layers"]["moe"]["router"].pop("bias")
    assert bias.dtype == np.float32
    np.testing.assert_array_equal(bias[0], tensors[BIAS])
    assert {str(w.dtype) for w in jax.tree.leaves(params)} == {expected}
    found = leaf(params, "moe_layers.moe.experts.up")[1, 3]
    np.testing.assert_array_equal(found, tensors[UP].T.astype(expected))


@pytest.mark.parametrize("block", [8, 128])
def test_fp8_is_exact(tmp_path, block):
    tensors = quantised(random_tensors(), block)
    quantisation = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    model, params = kimi_jax.load(save(tmp_path, tensors, quantization_config=quantisation, torch_dtype="bfloat16"))
    assert (model.cfg.dtype, model.cfg.param_dtype) == ("float32", "float32")
    scale = np.kron(tensors[UP + "_scale_inv"], np.ones((block, block)))[:12, :36]
    exact = (tensors[UP].astype(np.float64) * scale).astype(np.float32)
    np.testing.assert_array_equal(leaf(params, "moe_layers.moe.experts.up")[1, 3], exact.T)


def test_a_snapshot_in_the_cache_of_the_hub_is_links(tmp_path):
    blobs, snapshot = save(tmp_path / "blobs", random_tensors()), tmp_path / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs", file.name))
    jax.tree.map(np.testing.assert_array_equal, kimi_jax.load(snapshot)[1], kimi_jax.load(blobs)[1])


def test_shards_with_weight_and_scale_apart(tmp_path):
    tensors = quantised(random_tensors(), 128) | {
        f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(2, BF16) for i in range(3)
    }
    _, expected = kimi_jax.load(save(tmp_path / "whole", tensors))
    folder = save(tmp_path / "parts", {})
    (folder / "model.safetensors").unlink()
    files = {}
    for i, name in enumerate(sorted(tensors)):
        near = files.get(name.removesuffix("_scale_inv"), "")
        files[name] = next(f for f in np.roll(["a.safetensors", "b.safetensors", "c.safetensors"], i) if f != near)
    assert files[UP] != files[UP + "_scale_inv"]
    for file in set(files.values()):
        write_file(folder / file, {name: w for name, w in tensors.items() if files[name] == file})
    _, without_index = kimi_jax.load(folder)
    (folder / safetensors.INDEX).write_text(
        json.dumps({"weight_map": {name: str(file) for name, file in files.items()}})
    )
    _, with_index = kimi_jax.load(folder)
    for found in (without_index, with_index):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Two checkpoints of a run: the weights of step 7 are those of step 3 doubled."""
    folder = tmp_path_factory.mktemp("run")
    params = kimi_jax.load(save(folder / "hf", random_tensors()))[1]
    meta = {"config": {"model": dataclasses.asdict(CFG), "data": {"tokenizer": "bytes"}}}
    checkpoints = Checkpoints(folder / FOLDER)
    for step, factor in ((3, 1), (7, 2)):
        scaled = jax.tree.map(lambda w, factor=factor: w * factor, params)
        checkpoints.save(step, {"params": scaled, "optimizer": scaled}, meta)
    checkpoints.wait()
    checkpoints.close()
    return folder


@pytest.mark.parametrize("where, factor", [("", 2), (FOLDER, 2), (f"{FOLDER}/3", 1)])
def test_training_checkpoints(workdir, where, factor):
    model, params = kimi_jax.load(workdir / where)
    assert model.cfg == CFG
    np.testing.assert_array_equal(leaf(params, "lm_head"), random_tensors()["lm_head.weight"].T * factor)
    assert {str(w.dtype) for w in jax.tree.leaves(params)} == {"float32"}
    assert tokenizer_of(workdir / where) == "bytes"


def test_training_checkpoint_in_another_dtype(workdir):
    model, params = kimi_jax.load(workdir, dtype="bfloat16")
    assert (model.cfg.dtype, model.cfg.param_dtype) == ("bfloat16", "bfloat16")
    np.testing.assert_array_equal(leaf(params, "lm_head"), (random_tensors()["lm_head.weight"].T * 2).astype(BF16))
    np.testing.assert_array_equal(leaf(params, "moe_layers.moe.router.bias")[0], random_tensors()[BIAS] * 2)


def test_training_checkpoint_that_is_not_finite(tmp_path):
    params = kimi_jax.load(save(tmp_path / "hf", random_tensors()))[1]
    checkpoints = Checkpoints(tmp_path / FOLDER)
    meta = {"config": {"model": dataclasses.asdict(CFG), "data": {"tokenizer": "bytes"}}}
    checkpoints.save(1, {"params": params | {"norm": params["norm"].at[3].set(jnp.nan)}}, meta)
    checkpoints.wait()
    with pytest.raises(UserError, match="^norm in .* holds NaN or infinity"):
        kimi_jax.load(tmp_path)
    checkpoints.close()


def test_mesh_replicates(tmp_path):
    mesh = jax.make_mesh((1,), ("data",))
    _, params = kimi_jax.load(save(tmp_path, random_tensors()), mesh=mesh)
    assert all(w.sharding.mesh == mesh and w.sharding.is_fully_replicated for w in jax.tree.leaves(params))


def test_extra_prediction_layers(tmp_path):
    """Ignored if the config announces them."""
    tensors = random_tensors() | {"model.layers.3.eh_proj.weight": np.ones((2, 2), np.float32)}
    kimi_jax.load(save(tmp_path, tensors, num_nextn_predict_layers=1))
    with pytest.raises(UserError, match="model.layers.3.eh_proj.weight"):
        kimi_jax.load(save(tmp_path, tensors, num_nextn_predict_layers=0))


def test_a_layer_of_the_model_is_no_extra_one(tmp_path):
    """Though transformers announces one prediction layer in whatever it saves."""
    with pytest.raises(UserError, match="tensors that this model does not have: model.layers.2"):
        kimi_jax.load(save(tmp_path, random_tensors(), num_hidden_layers=2, num_nextn_predict_layers=1))


NAN = random_tensors()[UP]
NAN[1, 2] = np.nan
INF = random_tensors()[UP].astype(BF16)
INF[0, 0] = np.inf
FP8_NAN = quantised(random_tensors(), 128)
FP8_NAN[UP].view(np.uint8)[3, 4] = 0x7F
NO_SCALE = quantised(random_tensors(), 128)
del NO_SCALE[UP + "_scale_inv"]


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({k: v for k, v in random_tensors().items() if k != UP}, f"lacks 1 of .*{UP}"),
        ({k: v for k, v in random_tensors().items() if ".1." not in k}, "lacks 29 of .*, ..."),
        (random_tensors() | {"model.extra": np.ones(1, np.float32)}, "does not have: model.extra"),
        (random_tensors() | {UP: np.ones((36, 12), np.float32)}, rf"model.safetensors: {UP} has shape \(36, 12\)"),
        (random_tensors() | {BIAS: np.ones((4, 1), np.float32)}, rf"{BIAS} has shape"),
        (random_tensors() | {UP: np.ones((12, 36), np.int32)}, f"{UP} has dtype int32"),
        (random_tensors() | {UP: NAN}, f"model.safetensors: {UP} holds NaN"),
        (random_tensors() | {UP: INF}, f"model.safetensors: {UP} holds NaN or inf"),
        (FP8_NAN, f"{UP} holds NaN"),
        (NO_SCALE, f"{UP} is fp8, but there is no {UP}_scale_inv"),
        (random_tensors() | {UP + "_scale_inv": np.ones((1, 1), np.float32)}, "only fp8 weights have scales"),
        (quantised(random_tensors(), 8), "scales have shape"),
    ],
)
def test_bad_tensors(tmp_path, tensors, message):
    with pytest.raises(UserError, match=message) as error:
        kimi_jax.load(save(tmp_path, tensors))
    assert "\n" not in str(error.value)


def test_too_large_for_the_dtype_asked_for(tmp_path):
    """A number that f32 holds and bf16 rounds to infinity."""
    large = random_tensors()[UP]
    large[-1, -1] = 3.4e38
    kimi_jax.load(save(tmp_path, random_tensors() | {UP: large}))
    with pytest.raises(UserError, match=f"{UP} holds .* too large for bfloat16"):
        kimi_jax.load(tmp_path, dtype="bfloat16")


def test_gains_in_f32_are_not_rounded(tmp_path):
    tensors = {name: w.astype(BF16) if w.ndim == 2 else w for name, w in random_tensors().items()}
    model, params = kimi_jax.load(save(tmp_path, tensors))
    assert model.cfg.dtype == "float32"
    np.testing.assert_array_equal(params["norm"], tensors["model.norm.weight"])


def test_wrong_grid_is_named(tmp_path):
    tensors = quantised(random_tensors(), 128) | {UP + "_scale_inv": np.ones((2, 1), np.float32)}
    with pytest.raises(UserError, match=rf"{UP}: scales have shape \(2, 1\), expected \(1, 1\)"):
        kimi_jax.load(save(tmp_path, tensors))


def test_truncated_shard(tmp_path):
    file = save(tmp_path, random_tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="model.safetensors is truncated: .*"):
        kimi_jax.load(tmp_path)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"hidden_size": 35}, "shape"),
        ({"num_hidden_layers": 4}, "lacks"),
        ({"n_routed_experts": 1}, "num_experts_per_tok"),
        ({"n_group": 8}, "n_group"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}}, "weight_block_size"),
        ({"quantization_config": "fp8"}, "quantization_config must be an object"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers must be int"),
    ],
)
def test_impossible_config(tmp_path, config, message):
    with pytest.raises(UserError, match=message):
        kimi_jax.load(save(tmp_path, random_tensors(), **config))


def test_a_url_of_a_local_folder(tmp_path):
    (save(tmp_path, random_tensors()) / "tiktoken.model").write_text("")
    _, expected = kimi_jax.load(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, kimi_jax.load(f"file://{tmp_path}")[1], expected)
    assert tokenizer_of(f"file://{tmp_path}") == str(tmp_path / "tiktoken.model")


def test_no_config(tmp_path):
    (save(tmp_path, random_tensors()) / "config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        kimi_jax.load(tmp_path)


def test_no_weights(tmp_path):
    (save(tmp_path, {}) / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no .*safetensors"):
        kimi_jax.load(tmp_path)


@pytest.mark.parametrize("where", ["nothing here", ".", "file"])
def test_nothing_to_load(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=where if where != "." else "neither"):
        kimi_jax.load(tmp_path / where)


@pytest.mark.parametrize("dtype", ["int8", "float16", "nonsense", np.float64])
def test_bad_dtype(tmp_path, dtype):
    with pytest.raises(UserError, match="dtype must be"):
        kimi_jax.load(tmp_path, dtype=dtype)


def test_tokenizer_of(tmp_path):
    save(tmp_path, {})
    assert tokenizer_of(tmp_path) is None
    (tmp_path / "tiktoken.model").write_text("")
    assert tokenizer_of(tmp_path) == str(tmp_path / "tiktoken.model")


def test_importing_the_package_imports_no_jax():
    program = "import sys, kimi_jax; assert not {'jax', 'flax', 'orbax', 'grain', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


def test_public_names():
    assert kimi_jax.ModelConfig is ModelConfig and callable(kimi_jax.load) and kimi_jax.KimiK2
    with pytest.raises(AttributeError, match="nothing"):
        kimi_jax.nothing  # noqa: B018
