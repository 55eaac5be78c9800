"""The named shapes: the released numbers, and what every preset has to satisfy."""

from __future__ import annotations

import math
import re

import jax
import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.config import ModelConfig
from kimi_jax.dims import is_spec
from kimi_jax.errors import UserError
from kimi_jax.model import parameter_count, specs

KIMI_K2 = {  # config.json of moonshotai/Kimi-K2-Instruct, what matters of it
    "model_type": "kimi_k2",
    "vocab_size": 163_840,
    "hidden_size": 7168,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "routed_scaling_factor": 2.827,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 131_072,
    "rope_theta": 50_000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "attention_bias": False,
}


def test_kimi_k2_is_the_released_model():
    preset = presets.kimi_k2_1t()
    released = ModelConfig.from_hf(KIMI_K2)
    assert released.replace(dtype=preset.dtype, param_dtype=preset.param_dtype, remat=preset.remat) == preset


def test_parameter_count_of_moonlight():
    D, N, V = 2048, 16, 163_840
    attention = D * N * 192 + D * 576 + 512 + 512 * N * 256 + N * 128 * D + 2 * D
    expert = 3 * D * 1408
    layers = 27 * attention + 3 * D * 11_264 + 26 * (D * 64 + (64 + 2) * expert)
    assert parameter_count(presets.moonlight_16b()) == layers + 2 * V * D + D
    assert parameter_count(presets.moonlight_16b()) == pytest.approx(16e9, rel=0.01)


def test_parameter_count_of_the_middle_size():
    assert parameter_count(presets.mid_196m()) == pytest.approx(196e6, rel=0.02)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_preset(name):
    cfg = presets.get(name)
    again = ModelConfig.from_hf(cfg.to_hf(), dtype=cfg.dtype, param_dtype=cfg.param_dtype, remat=cfg.remat)
    assert again == cfg
    total = sum(math.prod(spec.shape) for spec in jax.tree.leaves(specs(cfg), is_leaf=is_spec))
    assert total - parameter_count(cfg) == cfg.n_moe_layers * cfg.n_routed_experts
    assert ModelConfig.from_config({"preset": name}) == cfg


@pytest.mark.parametrize(("experts", "k", "released"), [(384, 8, 2.827), (64, 6, 2.446)])
def test_gate_scale_gives_the_released_factors(experts, k, released):
    assert presets.gate_scale(experts, k) == pytest.approx(released, abs=0.01)


def test_gate_scale_of_equal_gates():
    """All experts chosen: p is nearly even, and k equal gates need sqrt(k)."""
    assert presets.gate_scale(4, 4) == pytest.approx(2.0, rel=0.1)
    assert presets.gate_scale(7, 1) == 1.0
    assert presets.tiny().routed_scaling_factor == presets.gate_scale(16, 4)
    assert np.sqrt(4) * 0.9 < presets.gate_scale(16, 4) < np.sqrt(4)


@pytest.mark.parametrize("name", ["kimi", ["tiny"]])
def test_unknown_preset(name):
    with pytest.raises(UserError, match=rf"unknown preset {re.escape(repr(name))}; there are kimi_k2_1t"):
        presets.get(name)
