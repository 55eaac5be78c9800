"""What config.json says of the rotary embedding, wherever it says it, is what transformers reads there."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as reference

from kimi_jax.config import ModelConfig, RopeConfig
from kimi_jax.layers.rope import frequencies
from tests.test_config import RELEASED, YARN


@pytest.mark.parametrize(
    "change",
    [
        {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
        {"rope_scaling": None, "rope_parameters": YARN | {"rope_theta": 1234.0}},
        {"original_max_position_embeddings": 64},
        {"partial_rotary_factor": 1.0},
    ],
)
def test_either_object_and_what_stands_beside_it(change):
    cfg = ModelConfig.from_hf(RELEASED | change)
    hf = DeepseekV3Config.from_dict(copy.deepcopy(RELEASED | change))
    rotary = reference.DeepseekV3RotaryEmbedding(hf)
    np.testing.assert_allclose(frequencies(cfg.rope, cfg.qk_rope_head_dim), rotary.inv_freq.numpy(), rtol=2e-7)
    softmax_scale = reference.yarn_apply_mscale(hf.rope_parameters, hf.qk_head_dim**-0.5)
    assert (cfg.rope.attention_scaling, cfg.softmax_scale) == pytest.approx((rotary.attention_scaling, softmax_scale))


@pytest.mark.parametrize("dim", [2, 8, 24, 64, 128])
@pytest.mark.parametrize("theta", [10_000.0, 50_000.0, 1_000_000.0, 1234.5])
def test_frequencies_to_the_bit(theta, dim):
    """Plain ones and YaRN's: at position 100,000 another last bit is another angle."""
    yarn = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    for given, factor in (({"rope_type": "default"}, 1.0), (yarn, 32.0)):
        hf = DeepseekV3Config(rope_parameters=given | {"rope_theta": theta}, qk_rope_head_dim=dim)
        found = frequencies(RopeConfig(theta=theta, factor=factor), dim)
        np.testing.assert_array_equal(found, reference.DeepseekV3RotaryEmbedding(hf).inv_freq.numpy())
