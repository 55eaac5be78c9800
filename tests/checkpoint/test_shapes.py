"""Models of other shapes, converted: all dense, all experts, no query latent, sizes that no block or chunk divides."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import kimi_jax
from kimi_jax.checkpoint import units
from kimi_jax.checkpoint.convert import from_hf
from tests.checkpoint.examples import CFG, quantised, random_tensors, save_hf

SHAPES = {
    "all dense": dict(first_k_dense_replace=3),
    "all experts": dict(first_k_dense_replace=0),
    "no query latent": dict(q_lora_rank=None),
    "one layer": dict(num_hidden_layers=1, n_routed_experts=2, num_experts_per_tok=1),
    "primes": dict(vocab_size=37, hidden_size=131, moe_intermediate_size=17, kv_lora_rank=7, q_lora_rank=13),
}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_bytes, block", [(3000, (128, 128)), (1 << 20, (16, 48))])
def test_the_same_weights(tmp_path, monkeypatch, shape, dtype, chunk_bytes, block):
    monkeypatch.setattr(units, "CHUNK_BYTES", chunk_bytes)
    cfg = CFG.replace(**SHAPES[shape])
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}
    source = save_hf(tmp_path / "hf", quantised(random_tensors(cfg), block), cfg, **config)
    from_hf(source, tmp_path / "t", dtype)
    wanted = "bfloat16" if dtype == "bf16" else None
    found, expected = kimi_jax.load(tmp_path / "t")[1], kimi_jax.load(source, dtype=wanted)[1]
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found, expected)
