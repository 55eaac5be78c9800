"""What a Hugging Face directory of each kind computes once it is loaded, against transformers with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

import kimi_jax
from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.safetensors_writer import write_file
from tests.parity.test_transformers import Case, build, relative

# Larger than a block of 128 on both sides, and no multiple of it.
PARTIAL_BLOCKS = Case(
    dict(
        hidden_size=136,
        intermediate_size=150,
        moe_intermediate_size=130,
        num_hidden_layers=2,
        n_routed_experts=4,
        kv_lora_rank=132,
        q_lora_rank=140,
        qk_nope_head_dim=20,
        qk_rope_head_dim=24,
        v_head_dim=30,
    )
)


def logits_of(folder: Path, tokens: np.ndarray, **options) -> np.ndarray:
    model, params = kimi_jax.load(folder, **options)
    return np.asarray(jax.jit(lambda p: model.apply({"params": p}, jnp.asarray(tokens)))(params))


def in_f32(folder: Path) -> DeepseekV3ForCausalLM:
    """As transformers reads it. Not ``model.float()``: a model that was bf16 has rounded its frequencies too."""
    options = dict(attn_implementation="eager", experts_implementation="eager")
    return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def expected_logits(model: DeepseekV3ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def some_tokens(length: int) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 160, (2, length))


def quantise(w: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """e4m3 weights, scales that make every block's largest 448, and the f32 weights that the two stand for."""
    rows, columns = (-(-n // block) for n in w.shape)
    q, exact = np.empty(w.shape, ml_dtypes.float8_e4m3fn), np.empty_like(w)
    scales = np.empty((rows, columns), np.float32)
    for i in range(rows):
        for j in range(columns):
            at = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(w[at]).max() / 448
            q[at] = (w[at] / scales[i, j]).astype(q.dtype)
            exact[at] = q[at].astype(np.float64) * np.float64(scales[i, j])
    return q, scales, exact


@pytest.mark.parametrize("block", [128, 32])
def test_block_fp8(tmp_path, block):
    """Projections in fp8, a weight and its scales in different files, the rest in f32 and a stray tensor in bf16."""
    model = build(PARTIAL_BLOCKS)
    model.save_pretrained(tmp_path / "full")
    full = safetensors.read(tmp_path / "full" / "model.safetensors")
    shards: tuple[dict, dict] = ({}, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(12, ml_dtypes.bfloat16)})
    dequantised = {}
    for i, (name, w) in enumerate(full.items()):
        if "_proj" not in name:
            shards[i % 2][name] = dequantised[name] = w
            continue
        shards[i % 2][name], shards[(i + 1) % 2][name + "_scale_inv"], dequantised[name] = quantise(np.array(w), block)

    folder = tmp_path / "fp8"
    folder.mkdir()
    for i, shard in enumerate(shards):
        write_file(folder / f"part-{i}.safetensors", shard)
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [block, block]}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))

    write_file(tmp_path / "full" / "model.safetensors", dequantised)
    tokens = some_tokens(32)
    expected = expected_logits(in_f32(tmp_path / "full"), tokens)
    assert relative(expected_logits(model, tokens), expected) > 1e-3  # quantisation is visible
    assert relative(logits_of(folder, tokens), expected) <= 2e-5


def test_bf16_weights_in_many_shards(tmp_path):
    """Computed in f32 on request; as stored, the weights are the same numbers."""
    build(Case({})).bfloat16().save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 5
    tokens = some_tokens(32)
    assert relative(logits_of(tmp_path, tokens, dtype="float32"), expected_logits(in_f32(tmp_path), tokens)) <= 2e-5
    kept, converted = kimi_jax.load(tmp_path)[1], kimi_jax.load(tmp_path, dtype="float32")[1]
    assert {str(w.dtype) for w in jax.tree.leaves(kept)} == {"bfloat16", "float32"}  # f32: the router's bias
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), kept, converted)


def test_no_shared_experts(tmp_path):
    """transformers saves them all the same, with no columns."""
    model = build(Case(dict(n_shared_experts=0)))
    model.save_pretrained(tmp_path)
    tokens = some_tokens(32)
    assert relative(logits_of(tmp_path, tokens), expected_logits(model, tokens)) <= 2e-5


def test_a_context_longer_than_the_original(tmp_path):
    """4,200 tokens: past YaRN's original 4,096, where nothing may switch."""
    model = build(Case(dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)))
    model.save_pretrained(tmp_path)
    tokens = some_tokens(4200)[:1]
    found, expected = logits_of(tmp_path, tokens), expected_logits(model, tokens)
    assert relative(found, expected) <= 2e-5
    assert relative(found[:, 4096:], expected[:, 4096:]) <= 2e-5
