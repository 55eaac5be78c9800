"""Configurations from every source: Hugging Face, ``get_config()``, plain dicts; and what they refuse."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from kimi_jax import presets
from kimi_jax.config import ModelConfig, RopeConfig, from_dict
from kimi_jax.errors import UserError

# config.json of moonshotai/Kimi-K2-Instruct.
RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 163584,
    "eos_token_id": 163585,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 131072,
    "model_type": "kimi_k2",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 50000.0,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.3",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 163840,
}


def without(config: dict, *names: str) -> dict:
    return {key: value for key, value in config.items() if key not in names}


YARN = RELEASED["rope_scaling"]
WITHOUT_FACTOR = without(YARN, "factor")


def test_released_config_is_the_preset():
    cfg = ModelConfig.from_hf(RELEASED)
    assert (cfg.dtype, cfg.param_dtype) == ("bfloat16", "bfloat16")
    preset = presets.kimi_k2_1t()
    assert cfg.replace(param_dtype=preset.param_dtype, remat=preset.remat) == preset


def test_k2_attention_scale():
    cfg = ModelConfig.from_hf(RELEASED)
    assert cfg.softmax_scale == pytest.approx(0.13086080, rel=1e-6)
    assert cfg.rope.attention_scaling == 1.0
    assert (cfg.n_moe_layers, cfg.qk_head_dim) == (60, 192)


def test_rope_parameters_of_transformers_5():
    """The theta moves inside; the result is the same."""
    parameters = without(RELEASED["rope_scaling"], "type") | {"rope_type": "yarn", "rope_theta": 50000.0}
    newer = without(RELEASED, "rope_scaling", "rope_theta", "torch_dtype") | {
        "rope_parameters": parameters,
        "dtype": "bfloat16",
    }
    assert ModelConfig.from_hf(newer) == ModelConfig.from_hf(RELEASED)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None, "rope_theta": 1234.0},
        {"rope_theta": 1234.0},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1234.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 1234.0},
    ],
)
def test_plain_rope(rope):
    cfg = ModelConfig.from_hf(without(RELEASED, "rope_scaling", "rope_theta") | rope)
    assert (cfg.rope.theta, cfg.rope.factor) == (1234.0, 1.0)
    assert cfg.softmax_scale == pytest.approx(192**-0.5)
    assert cfg.rope.attention_scaling == 1.0


def m(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1


@pytest.mark.parametrize(
    "mscales, attention, softmax",
    [
        ({"mscale": 0.7, "mscale_all_dim": 1.3}, m(32, 0.7) / m(32, 1.3), m(32, 1.3) ** 2),
        ({"mscale_all_dim": 0.5}, m(32, 1), m(32, 0.5) ** 2),
        ({"mscale": 0.5}, m(32, 1), 1.0),
        ({}, m(32, 1), 1.0),
    ],
)
def test_mscales_as_transformers_reads_them(mscales, attention, softmax):
    scaling = without(RELEASED["rope_scaling"], "mscale", "mscale_all_dim") | mscales
    cfg = ModelConfig.from_hf(RELEASED | {"rope_scaling": scaling})
    assert cfg.rope.attention_scaling == pytest.approx(attention)
    assert cfg.softmax_scale == pytest.approx(192**-0.5 * softmax)


def test_what_yarn_leaves_out_follows_from_the_longest_context():
    scaling = {"type": "yarn", "factor": 4.0, "beta_fast": None}
    cfg = ModelConfig.from_hf(RELEASED | {"rope_scaling": scaling})
    assert cfg.rope == RopeConfig(50_000.0, 4.0, 131_072, 32.0, 1.0, mscale=0.0)
    scaling = {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    assert ModelConfig.from_hf(RELEASED | {"rope_scaling": scaling}).rope.factor == 16.0
    short = RELEASED | {"rope_scaling": scaling | {"original_max_position_embeddings": 1024}}
    assert ModelConfig.from_hf(short | {"max_position_embeddings": None}).rope.factor == 4.0


def test_betas_of_0_are_absent():
    """As in transformers: ``rope_parameters.get("beta_fast") or 32``."""
    rope = ModelConfig.from_hf(RELEASED | {"rope_scaling": YARN | {"beta_fast": 0, "beta_slow": 0.0}}).rope
    assert (rope.beta_fast, rope.beta_slow) == (32.0, 1.0)


@pytest.mark.parametrize(
    "cfg",
    [
        presets.tiny(),
        presets.moonlight_16b(),
        presets.tiny().replace(rope=dataclasses.replace(presets.YARN_K2, mscale=0.7, mscale_all_dim=1.3)),
        presets.tiny().replace(rope=RopeConfig(factor=8.0)),
        presets.tiny().replace(n_shared_experts=0, first_k_dense_replace=2, q_lora_rank=None),
        presets.tiny().replace(first_k_dense_replace=presets.tiny().num_hidden_layers),
    ],
)
def test_to_hf_and_back(cfg, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(cfg.to_hf()))
    found = ModelConfig.from_hf(tmp_path / "config.json")
    assert found.softmax_scale == cfg.softmax_scale
    assert found.replace(dtype=cfg.dtype, remat=cfg.remat) == cfg


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"n_group": 8}, "n_group=8"),
        ({"attention_bias": True}, "attention_bias"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"rope_interleave": False}, "rope_interleave"),
        ({"rope_interleave": None}, "rope_interleave=None"),
        ({"model_type": "llama"}, "llama"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": YARN | {"attention_factor": 2.0}}, "attention_factor"),
        ({"rope_scaling": YARN | {"truncate": None}}, "truncate=None"),
        ({"rope_scaling": YARN | {"theta": 1234.0}}, "theta=1234.0"),
        ({"rope_scaling": {"full_attention": YARN}}, "rope option full_attention="),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"hidden_size": "7168"}, "hidden_size must be int"),
        ({"hidden_size": 0}, "hidden_size must be at least 1"),
        ({"num_experts_per_tok": 385}, "exceeds"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace"),
        ({"qk_rope_head_dim": 63}, "even"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be positive"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor must be at least 0 and finite, not nan"),
        ({"routed_scaling_factor": -1.0}, "routed_scaling_factor must be at least 0"),
        ({"initializer_range": float("inf")}, "initializer_range must be at least 0 and finite, not inf"),
        ({"rope_theta": 0}, "rope.theta must be above 1"),
        ({"rope_theta": "big"}, "rope.theta must be float"),
        ({"rope_scaling": YARN | {"factor": float("nan")}}, "rope.factor must be at least 1"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "rope.beta_fast must be above 0"),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0}},
            "original_max_position_embeddings must be at",
        ),
        ({"rope_scaling": WITHOUT_FACTOR | {"original_max_position_embeddings": 0}}, "embeddings must be at least 1"),
        (
            {"rope_scaling": WITHOUT_FACTOR | {"original_max_position_embeddings": "x"}},
            "embeddings must be int, not 'x'",
        ),
        (
            {"rope_scaling": WITHOUT_FACTOR, "max_position_embeddings": "x"},
            "max_position_embeddings must be int, not 'x'",
        ),
        ({"rope_scaling": "yarn"}, "rope parameters must be an object"),
        ({"rope_parameters": [1]}, "rope parameters must be an object"),
    ],
)
def test_hf_refusals(change, message):
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.from_hf(RELEASED | change)
    assert "\n" not in str(error.value)


def test_shared_experts_null_are_none():
    assert ModelConfig.from_hf(RELEASED | {"n_shared_experts": None}).n_shared_experts == 0


def test_null_does_not_normalise():
    """As in transformers and the released code, to which null is no."""
    assert ModelConfig.from_hf(RELEASED | {"norm_topk_prob": None}).norm_topk_prob is False
    assert ModelConfig.from_hf(without(RELEASED, "norm_topk_prob")).norm_topk_prob is True


def test_rope_theta_null_is_absent():
    plain = RELEASED | {"rope_scaling": None}
    assert ModelConfig.from_hf(plain | {"rope_theta": None}) == ModelConfig.from_hf(without(plain, "rope_theta"))


def test_hf_lacks_a_size():
    with pytest.raises(UserError, match="lacks .*vocab_size"):
        ModelConfig.from_hf(without(RELEASED, "vocab_size"))


@pytest.mark.parametrize("name", ["first_k_dense_replace", "n_group", "routed_scaling_factor"])
def test_what_transformers_assumes_otherwise_has_to_be_there(name):
    for config in (without(RELEASED, name), RELEASED | {name: None}):
        with pytest.raises(UserError, match=f"config.json lacks {name}: add"):
            ModelConfig.from_hf(config)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[1]", "JSON object"), (None, "cannot read")])
def test_hf_file(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(tmp_path / "config.json")


def test_from_config_starts_from_a_preset():
    cfg = ModelConfig.from_config({"preset": "tiny", "hidden_size": 96, "rope": {"factor": 4}})
    expected = presets.tiny().replace(hidden_size=96)
    assert cfg == expected.replace(rope=dataclasses.replace(expected.rope, factor=4.0))


def test_from_config_without_a_preset():
    values = dataclasses.asdict(presets.tiny())
    assert ModelConfig.from_config(values) == presets.tiny()
    assert from_dict(ModelConfig, json.loads(json.dumps(values)), "model") == presets.tiny()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"preset": "tiny", "hiden_size": 8}, "model.hiden_size; did you mean model.hidden_size"),
        ({"prest": "tiny"}, "model.prest; did you mean model.preset"),
        ({"preset": "tiny", "rope": {"tehta": 8}}, "model.rope.tehta; did you mean model.rope.theta"),
        ({"preset": "tinny"}, "tinny.*tiny"),
        ({"hidden_size": 8}, "model lacks .*vocab_size"),
        ({"preset": "tiny", "hidden_size": 8.5}, "model.hidden_size must be int, not 8.5"),
        ({"preset": "tiny", "hidden_size": True}, "model.hidden_size must be int"),
        ({"preset": "tiny", "hidden_size": None}, "model.hidden_size must be int"),
        ({"preset": "tiny", "norm_topk_prob": 1}, "model.norm_topk_prob must be bool"),
        ({"preset": "tiny", "rope": {"theta": "big"}}, "model.rope.theta must be float"),
        ({"preset": "tiny", "rope": {"factor": 0.5}}, "model.rope.factor must be at least 1"),
        ({"preset": "tiny", "rope": {"factor": math.inf}}, "model.rope.factor must be at least 1 and finite, not inf"),
        ({"preset": "tiny", "rope": {"theta": 1}}, "model.rope.theta must be above 1"),
        ({"preset": "tiny", "rope": {"beta_slow": 0}}, "model.rope.beta_slow must be above 0"),
        ({"preset": "tiny", "rope": {"beta_fast": math.nan}}, "model.rope.beta_fast must be above 0"),
        ({"preset": "tiny", "rope": {"original_max_position_embeddings": 0}}, "embeddings must be at least 1"),
        ({"preset": "tiny", "rope": {"mscale_all_dim": -1}}, "model.rope.mscale_all_dim must be at least 0"),
        ({"preset": "tiny", "rope": 5}, "model.rope must be RopeConfig, not 5"),
        ({"preset": "tiny", "rope": 0}, "model.rope must be RopeConfig, not 0"),
        ({"preset": "tiny", "rope": "abc"}, "model.rope must be RopeConfig, not 'abc'"),
        ({"preset": "tiny", "dtype": "float8"}, "model.dtype must be"),
        ({"preset": "tiny", "n_shared_experts": -1}, "n_shared_experts"),
        ({"preset": "tiny", "q_lora_rank": 0}, "q_lora_rank"),
    ],
)
def test_from_config_refusals(values, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.from_config(values)


def test_whole_floats_and_widening():
    cfg = ModelConfig.from_config({"preset": "tiny", "hidden_size": 96.0, "routed_scaling_factor": 2})
    assert isinstance(cfg.hidden_size, int) and isinstance(cfg.routed_scaling_factor, float)


def test_gate_scale_gives_the_released_values():
    assert presets.gate_scale(384, 8) == pytest.approx(2.827, abs=0.01)
    assert presets.gate_scale(64, 6) == pytest.approx(2.446, abs=0.01)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets(name):
    assert presets.get(name) == presets.PRESETS[name]()
    assert hash(presets.get(name))
