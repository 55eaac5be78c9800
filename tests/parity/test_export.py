"""A directory that was converted and exported again computes the same in transformers."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import to_hf
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.verify import verify
from tests.parity.test_load_hf import PARTIAL_BLOCKS, expected_logits, in_f32, logits_of, quantise, some_tokens
from tests.parity.test_transformers import build


@pytest.mark.parametrize("dtype, kept", [(torch.float32, "float32"), (torch.bfloat16, "bf16")])
@pytest.mark.parametrize("shard_size", [50_000, 10**9])
def test_there_and_back(tmp_path, dtype, kept, shard_size):
    """The same weights, so the same logits to the last bit; one file or many."""
    build(PARTIAL_BLOCKS).to(dtype).save_pretrained(tmp_path / "source")
    from_hf(tmp_path / "source", tmp_path / "converted", kept)
    to_hf(tmp_path / "converted", tmp_path / "back", shard_size=shard_size)
    assert (len(list((tmp_path / "back").glob("*.safetensors"))) > 5) == (shard_size < 10**9)
    tokens = some_tokens(32)
    expected = expected_logits(in_f32(tmp_path / "source"), tokens)
    np.testing.assert_array_equal(expected_logits(in_f32(tmp_path / "back"), tokens), expected)
    model, found = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(found.values()) and model.dtype == dtype
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "back")) is DeepseekV3ForCausalLM


def test_fp8_weights(tmp_path):
    """Exported in bf16, they are what fp8 stands for, rounded once; exported in fp8, we compute the same as before."""
    build(PARTIAL_BLOCKS).save_pretrained(tmp_path / "full")
    full = safetensors.read(tmp_path / "full" / "model.safetensors")
    tensors, rounded = {}, {}
    for name, w in full.items():
        tensors[name] = rounded[name] = np.array(w)
        if "_proj" in name:
            tensors[name], tensors[name + "_scale_inv"], exact = quantise(np.array(w), 128)
            rounded[name] = torch.from_numpy(exact).bfloat16().float().numpy()
        elif not name.endswith("bias"):
            rounded[name] = torch.from_numpy(np.array(w)).bfloat16().float().numpy()
    (tmp_path / "fp8").mkdir()
    config = json.loads((tmp_path / "full" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    write_file(tmp_path / "fp8" / "model.safetensors", tensors)
    write_file(tmp_path / "full" / "model.safetensors", rounded)

    from_hf(tmp_path / "fp8", tmp_path / "converted", "fp8")
    to_hf(tmp_path / "converted", tmp_path / "back")
    to_hf(tmp_path / "converted", tmp_path / "bf16", "bf16")
    assert verify(tmp_path / "fp8", tmp_path / "back", digest=True).same
    tokens = some_tokens(32)
    expected = expected_logits(in_f32(tmp_path / "full"), tokens)
    np.testing.assert_array_equal(expected_logits(in_f32(tmp_path / "bf16"), tokens), expected)
    np.testing.assert_array_equal(*(logits_of(tmp_path / folder, tokens) for folder in ("back", "fp8")))
