"""The checkpoint map, against the released files: every name pattern, every count, every byte."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.checkpoint import fp8
from kimi_jax.checkpoint.hf_names import SCALE_SUFFIX, STRAY, TABLE, plan
from kimi_jax.config import ModelConfig
from kimi_jax.dims import is_spec
from kimi_jax.model import parameter_count, specs

K2 = presets.kimi_k2_1t()

# The released names and shapes [out, in], written down by hand. {L} a layer, {E} an expert.
ATTENTION = {
    "model.layers.{L}.input_layernorm.weight": (7168,),
    "model.layers.{L}.post_attention_layernorm.weight": (7168,),
    "model.layers.{L}.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.{L}.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.{L}.self_attn.q_b_proj.weight": (64 * 192, 1536),
    "model.layers.{L}.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.{L}.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.{L}.self_attn.kv_b_proj.weight": (64 * 256, 512),
    "model.layers.{L}.self_attn.o_proj.weight": (7168, 64 * 128),
}
DENSE = {
    "model.layers.{L}.mlp.gate_proj.weight": (18432, 7168),
    "model.layers.{L}.mlp.up_proj.weight": (18432, 7168),
    "model.layers.{L}.mlp.down_proj.weight": (7168, 18432),
}
MOE = {
    "model.layers.{L}.mlp.gate.weight": (384, 7168),
    "model.layers.{L}.mlp.gate.e_score_correction_bias": (384,),
    "model.layers.{L}.mlp.experts.{E}.gate_proj.weight": (2048, 7168),
    "model.layers.{L}.mlp.experts.{E}.up_proj.weight": (2048, 7168),
    "model.layers.{L}.mlp.experts.{E}.down_proj.weight": (7168, 2048),
    "model.layers.{L}.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.layers.{L}.mlp.shared_experts.up_proj.weight": (2048, 7168),
    "model.layers.{L}.mlp.shared_experts.down_proj.weight": (7168, 2048),
}
TOP = {
    "model.embed_tokens.weight": (163840, 7168),
    "model.norm.weight": (7168,),
    "lm_head.weight": (163840, 7168),
}


@pytest.fixture(scope="module")
def k2_entries():
    return list(plan(K2))


def released() -> dict[str, tuple[int, ...]]:
    found = dict(TOP)
    for layer in range(61):
        for name, shape in (ATTENTION | (MOE if layer else DENSE)).items():
            for expert in range(384) if "{E}" in name else (0,):
                found[name.format(L=layer, E=expert)] = shape
    return found


def test_every_released_name_and_shape(k2_entries):
    assert {entry.name: entry.shape for entry in k2_entries} == released()
    assert len(k2_entries) == len(released())


def test_released_totals(k2_entries):
    """69,608 fp8 matrices with a grid of scales each, the rest bf16 but the biases, and 61 stray frequencies."""
    quantised = [e for e in k2_entries if re.search(r"_proj(_with_mqa)?\.weight$", e.name)]
    biases = [e for e in k2_entries if e.name.endswith("bias")]
    bf16 = len(k2_entries) - len(quantised) - len(biases) + 61
    assert (len(quantised), len(biases), bf16) == (69_608, 60, 368)
    assert len(k2_entries) + len(quantised) + 61 == 139_644
    elements = sum(math.prod(e.shape) for e in quantised)
    assert elements == 1_023_893_241_856
    scales = sum(math.prod(fp8.grid(e.shape)) for e in quantised)
    others = sum(math.prod(e.shape) for e in k2_entries) - elements - 60 * 384
    assert elements + 4 * (scales + 60 * 384) + 2 * (others + 61 * STRAY_SIZE) == 1_029_173_256_720


STRAY_SIZE = 56


def test_tensors_per_released_shard(k2_entries):
    """Shard i holds layer i - 1; the first also the embedding, the last also norm and head."""
    found = Counter()
    for entry in k2_entries:
        layer = re.match(r"model\.layers\.(\d+)\.", entry.name)
        shard = int(layer[1]) if layer else 0 if "embed" in entry.name else 60
        found[shard] += 1 + bool(re.search(r"_proj(_with_mqa)?\.weight$", entry.name))
    assert [found[i] + 1 for i in range(61)] == [22, *[2327] * 59, 2329]


def test_parameter_count(k2_entries):
    trained = sum(math.prod(e.shape) for e in k2_entries if not e.name.endswith("bias"))
    assert trained == parameter_count(K2)


SHAPES = {
    "tiny": presets.tiny(),
    "no_query_latent": presets.tiny().replace(q_lora_rank=None, n_shared_experts=2),
    "two_dense": presets.tiny().replace(first_k_dense_replace=2, n_shared_experts=0),
    "no_dense": presets.tiny().replace(first_k_dense_replace=0, v_head_dim=20),
    "all_dense": presets.tiny().replace(first_k_dense_replace=4),
}


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)
def test_entries_tile_every_parameter_once(cfg: ModelConfig):
    seen = {}

    def zeros(tree):
        return {k: np.zeros(v.shape, int) if is_spec(v) else zeros(v) for k, v in tree.items()}

    seen = zeros(specs(cfg))
    names = []
    for entry in plan(cfg):
        part = seen
        for key in entry.path:
            part = part[key]
        part[entry.index] += 1
        names.append(entry.name)
        assert entry.from_hf(np.zeros(entry.shape)).shape == part[entry.index].shape

    def leaves(tree):
        return [leaf for v in tree.values() for leaf in (leaves(v) if isinstance(v, dict) else [v])]

    assert all((leaf == 1).all() for leaf in leaves(seen))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)
def test_there_and_back(cfg: ModelConfig):
    for entry in plan(cfg):
        tensor = np.arange(math.prod(entry.shape)).reshape(entry.shape)
        np.testing.assert_array_equal(entry.to_hf(entry.from_hf(tensor)), tensor)


def test_layout_of_heads():
    """Row n * (H + R) + i of q_b is output i of head n; column n * W + j of o is value j of head n."""
    cfg = presets.tiny()
    by_name = {entry.name: entry for entry in plan(cfg)}
    N, H, R, W, D = 4, 32, 16, 32, 128
    q_b = np.arange(N * (H + R) * 64).reshape(N * (H + R), 64)
    ours = by_name["model.layers.2.self_attn.q_b_proj.weight"].from_hf(q_b)
    assert ours.shape == (64, N, H + R) and ours[5, 3, 7] == q_b[3 * (H + R) + 7, 5]
    kv_b = np.arange(N * (H + W) * 48).reshape(N * (H + W), 48)
    ours = by_name["model.layers.0.self_attn.kv_b_proj.weight"].from_hf(kv_b)
    assert ours.shape == (48, N, H + W) and ours[9, 2, 40] == kv_b[2 * (H + W) + 40, 9]
    o = np.arange(D * N * W).reshape(D, N * W)
    ours = by_name["model.layers.1.self_attn.o_proj.weight"].from_hf(o)
    assert ours.shape == (N, W, D) and ours[3, 11, 100] == o[100, 3 * W + 11]


def test_layers_and_experts_are_numbered_through():
    by_name = {entry.name: entry for entry in plan(presets.tiny().replace(first_k_dense_replace=2))}
    dense = by_name["model.layers.1.mlp.up_proj.weight"]
    assert (dense.path, dense.index) == (("dense_layers", "mlp", "up"), (1,))
    expert = by_name["model.layers.3.mlp.experts.13.down_proj.weight"]
    assert (expert.path, expert.index) == (("moe_layers", "moe", "experts", "down"), (1, 13))


def test_the_table_is_one_to_one():
    for stack in ("dense_layers.", "moe_layers."):
        names = [name for path, name in TABLE.items() if path.startswith(stack)]
        assert len(set(names)) == len(names)


def test_companions():
    assert SCALE_SUFFIX == "_scale_inv"
    assert STRAY.fullmatch("model.layers.60.self_attn.rotary_emb.inv_freq")
    assert not STRAY.fullmatch("model.layers.60.self_attn.rotary_emb.inv_freq.weight")
