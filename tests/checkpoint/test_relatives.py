"""Relatives of Kimi-K2 convert by the same path: int4 experts as in K2-Thinking, the text part of K2.5."""

from __future__ import annotations

import json

import numpy as np
import pytest

from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.checkpoint.int4 import SUFFIXES
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.verify import verify
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError
from tests.checkpoint.examples import BF16, CFG, random_tensors, read, same, save_hf

SMALL = CFG.replace(hidden_size=96, moe_intermediate_size=64)
GROUP = 32
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
}


def quantised(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The files' tensors, routed experts in int4 and the rest in bf16; and the weights that they stand for, in f32.

    Packs by text: the nibbles of a word, last to first, are the hexadecimal digits of an unsigned number.
    """
    stored, exact = {}, {}
    for name, w in tensors.items():
        if ".experts." not in name:
            stored[name] = w if name.endswith("bias") else w.astype(BF16)
            exact[name] = stored[name].astype(np.float32)
            continue
        groups = w.reshape(len(w), -1, GROUP).astype(np.float64)
        scale = (np.abs(groups).max(axis=-1) / 7).astype(BF16)
        n = np.clip(np.rint(groups / scale[..., None].astype(np.float64)), -8, 7).astype(int)
        exact[name] = (n * scale[..., None].astype(np.float64)).reshape(w.shape).astype(np.float32)
        words = [int("".join(f"{i + 8:x}" for i in word[::-1]), 16) for word in n.reshape(-1, 8)]
        stored[name + "_packed"] = np.array(words, np.uint32).view(np.int32).reshape(len(w), -1)
        stored[name + "_scale"] = scale
        stored[name + "_shape"] = np.array(w.shape, np.int64)
    return stored, exact


def thinking(folder):
    """A directory like K2-Thinking's, and its weights."""
    stored, exact = quantised(random_tensors(SMALL))
    return save_hf(folder, stored, SMALL, quantization_config=INT4), exact


def multimodal(folder):
    """A directory like K2.5's: the text model under a prefix and beside one that sees, in files numbered otherwise."""
    stored, exact = quantised(random_tensors(SMALL))
    stored = {f"language_model.{name}": w for name, w in stored.items()}
    stored["vision_tower.encoder.blocks.0.wqkv.weight"] = np.ones((3, 4), BF16)
    stored["mm_projector.proj.0.bias"] = np.ones(5, BF16)
    text = SMALL.to_hf() | {"quantization_config": INT4, "eos_token_id": 7}
    config = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "text_config": text}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"vision_config": {"hidden_size": 4}}))
    names, weight_map = sorted(stored), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-000003.safetensors"
        write_file(folder / file, {name: stored[name] for name in names[i::3]})
        weight_map |= dict.fromkeys(names[i::3], file)
    (folder / safetensors.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, exact


@pytest.mark.parametrize("make", [thinking, multimodal])
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_converted(tmp_path, make, dtype):
    """Every weight is the exact product of nibble and scale, rounded once."""
    source, exact = make(tmp_path / "source")
    from_hf(source, tmp_path / "converted", dtype)
    arrays = Arrays.open(tmp_path / "converted" / "state")
    for entry in plan(SMALL):
        expected = exact[entry.name]
        if dtype == "bf16" and not entry.name.endswith("bias"):
            expected = expected.astype(BF16)
        found = arrays.read(f"params.{'.'.join(entry.path)}", entry.index)
        found = found.reshape(expected.shape[::-1]).T if entry.inputs else found
        assert same(np.ascontiguousarray(found), expected), entry.name
    assert verify(source, tmp_path / "converted").same


@pytest.mark.parametrize("make", [thinking, multimodal])
def test_exported_as_a_text_model(tmp_path, make):
    source, exact = make(tmp_path / "source")
    from_hf(source, tmp_path / "converted", "bf16")
    to_hf(tmp_path / "converted", tmp_path / "back", shard_size=50_000)
    found = read(tmp_path / "back")
    assert found.keys() == exact.keys()
    assert all(same(w, exact[name] if name.endswith("bias") else exact[name].astype(BF16)) for name, w in found.items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert "quantization_config" not in config and "text_config" not in config
    assert config.get("eos_token_id") == (7 if make is multimodal else None)
    assert ModelConfig.from_hf(config) == SMALL.replace(param_dtype="bfloat16")
    assert verify(source, tmp_path / "back").same


def test_int4_is_not_fp8(tmp_path):
    source, _ = thinking(tmp_path / "source")
    with pytest.raises(UserError, match="no fp8"):
        from_hf(source, tmp_path / "converted", "fp8")


def test_damage_is_found_by_name(tmp_path):
    stored, _ = quantised(random_tensors(SMALL))
    up = "model.layers.2.mlp.experts.3.up_proj.weight"
    scale = stored[up + "_scale"].copy()
    scale[1, 1] = np.nan
    norm = "model.layers.1.input_layernorm.weight"
    for i, (change, message) in enumerate([
        ({up + "_scale": scale}, f"{up}.*NaN"),
        ({up + "_shape": np.array([64, 95])}, f"{up}_shape says"),
        ({up + "_packed": stored[up + "_packed"][:, :-1]}, f"{up}_packed has shape"),
        ({up + "_scale": stored[up + "_scale"].T}, f"{up}_scale has shape"),
        ({up + "_scale": None}, f"no {up}_scale"),
        ({up + "_scale": scale.astype(bool)}, f"{up}_scale has dtype bool"),
        ({up + "_packed": stored[up + "_packed"].astype(np.int64)}, f"{up}_packed has dtype int64"),
        ({up + "_shape": np.int64(64)}, rf"{up}_shape has shape \(\), expected \(2,\)"),
        ({norm: None, **{norm + suffix: stored[up + suffix] for suffix in SUFFIXES}}, f"{norm}_packed .*only matrices"),
    ]):  # fmt: skip
        tensors = {name: w for name, w in (stored | change).items() if w is not None}
        source = save_hf(tmp_path / f"source{i}", tensors, SMALL, quantization_config=INT4)
        with pytest.raises(UserError, match=f"model.safetensors: .*{message}"):
            from_hf(source, tmp_path / f"converted{i}", "bf16")
        assert not (tmp_path / f"converted{i}" / "meta").exists()
