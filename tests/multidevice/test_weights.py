"""Served weights on eight devices: every shard of values has the scales it needs, and together they are the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kimi_jax import presets
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.inference import cache
from kimi_jax.inference.forward import forward
from kimi_jax.inference.ops import ON_ONE_DEVICE
from kimi_jax.inference.place import partitions
from kimi_jax.inference.sharded import AXIS, serving_mesh, sharded_ops
from kimi_jax.inference.weights import abstract, held, serving_params
from kimi_jax.layers.quantized import Quantized
from tests.checkpoint.examples import random_params

DIVIDES = presets.tiny().replace(
    vocab_size=40, hidden_size=136, intermediate_size=1280, moe_intermediate_size=24, n_routed_experts=16,
    num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=8, kv_lora_rank=130, q_lora_rank=14,
    qk_nope_head_dim=20, qk_rope_head_dim=4, v_head_dim=6, dtype="float32",
)  # fmt: skip
SHAPES = {  # device's parts of the dense layer: 160 of 1280, of the shared experts 3 of 24
    "divides": DIVIDES,
    "padded": DIVIDES.replace(
        vocab_size=41, num_attention_heads=3, n_routed_experts=6, intermediate_size=300, q_lora_rank=None
    ),
}


def is_quantised(w) -> bool:
    return isinstance(w, Quantized)


@pytest.mark.parametrize("block", [(128, 128), (24, 40)])
@pytest.mark.parametrize("format", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_shards_are_the_whole(shape, format, block):
    cfg, mesh = SHAPES[shape], serving_mesh(jax.devices())
    params = random_params(cfg=cfg)
    whole = serving_params(abstract(cfg, format, block=block), cfg, format, held(params), block)
    reads: list[str] = []

    def read(entry):
        reads.append(entry.name)
        return held(params)(entry)

    sharded = serving_params(abstract(cfg, format, mesh, block), cfg, format, read, block)
    assert sorted(reads) == sorted(entry.name for entry in plan(cfg))  # each once, for all devices
    specs, specs_of_weights = partitions(sharded, cfg, mesh), partitions(params, cfg, mesh)
    assert [w.sharding.spec for w in jax.tree.leaves(sharded)] == jax.tree.leaves(specs)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(specs,), out_specs=specs_of_weights)
    def dequantised(params):
        return jax.tree.map(lambda w: w.astype(jnp.float32), params, is_leaf=is_quantised)

    def compare(path, w, found):
        w = np.asarray(w.astype(jnp.float32))
        w = np.pad(w, [(0, size - own) for size, own in zip(found.shape, w.shape, strict=True)])
        np.testing.assert_array_equal(found, w, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, whole, dequantised(sharded), is_leaf=is_quantised)
    n = {w.sharding.shard_shape(w.shape)[1] for w in jax.tree.leaves(sharded["moe_layers"]["moe"]["experts"])}
    assert n == {-(-cfg.n_routed_experts // 8)}


@pytest.mark.parametrize("format", ["fp8", "int8"])
def test_the_forward_pass_runs_on_them(format):
    """Eight rows, each living on a device of its own, against one device with them all."""
    cfg, mesh = SHAPES["padded"], serving_mesh(jax.devices())
    params = random_params(cfg=cfg)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, cfg.vocab_size, (8, 3)))
    start, length = jnp.zeros(8, jnp.int32), jnp.asarray([3, 1, 2, 3, 3, 2, 1, 3])

    def run(params, cache_LPGX, pages, rows=None):
        ops = sharded_ops(rows, 8, cfg.vocab_size) if rows is not None else ON_ONE_DEVICE
        return forward(params, cfg, cache_LPGX, tokens, start, length, pages, ops)[0]

    one, eight = (serving_params(abstract(cfg, format, on), cfg, format, held(params)) for on in (None, mesh))
    expected = jax.jit(run)(one, cache.init(cfg, 9, 16), 1 + np.arange(8)[:, None])
    whole = PartitionSpec()
    specs = (partitions(eight, cfg, mesh), PartitionSpec(None, AXIS), whole, whole)
    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False))
    found = spread(eight, cache.init(cfg, 16, 16), np.ones((8, 1), np.int32), np.arange(8)[:, None])
    for row, n in enumerate(length.tolist()):
        np.testing.assert_allclose(found[row, :n], expected[row, :n], rtol=1e-3, atol=1e-4)
