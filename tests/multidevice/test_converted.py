"""A converted checkpoint on eight devices: experts split, every device's shard read once, the same logits."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

import kimi_jax
from kimi_jax import presets
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.errors import UserError
from tests.checkpoint.examples import FP8_CONFIG, quantised, random_tensors, save_hf

CFG = presets.tiny().replace(
    vocab_size=40, hidden_size=136, intermediate_size=20, moe_intermediate_size=24, n_routed_experts=8,
    num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, kv_lora_rank=10, q_lora_rank=14,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    tensors = {name: w / 8 if "norm" not in name else w for name, w in random_tensors(CFG).items()}
    return save_hf(tmp_path_factory.mktemp("source") / "hf", quantised(tensors), CFG, **FP8_CONFIG)


@pytest.fixture(scope="module")
def targets(tmp_path_factory, source):
    folder = tmp_path_factory.mktemp("targets")
    for dtype in ("fp8", "float32"):
        from_hf(source, folder / dtype, dtype)
    return folder


def mesh(shape, names, kind=AxisType.Auto):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("what", ["fp8", "float32", "hf"])
def test_experts_are_split(source, targets, what, kind):
    path = source if what == "hf" else targets / what
    on = mesh((2, 4), ("data", "expert"), kind)
    (_, one), (_, eight) = kimi_jax.load(path), kimi_jax.load(path, mesh=on)
    for name in ("gate", "up", "down"):
        assert eight["moe_layers"]["moe"]["experts"][name].sharding.spec[:2] == (None, "expert")
    assert eight["moe_layers"]["attn"]["o"].sharding.is_fully_replicated
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), eight, one)
    assert {len(w.devices()) for w in jax.tree.leaves(eight)} == {8}


def test_the_same_logits(targets):
    tokens = np.random.default_rng(0).integers(0, 40, (2, 16))
    model, one = kimi_jax.load(targets / "fp8")
    expected = jax.jit(lambda p: model.apply({"params": p}, tokens))(one)
    for on in (
        mesh((8,), ("expert",)),
        mesh((2, 4), ("data", "expert"), AxisType.Explicit),
        mesh((8,), ("data",)),
    ):
        _, split = kimi_jax.load(targets / "fp8", mesh=on)
        found = jax.jit(lambda p: model.apply({"params": p}, tokens))(split)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_shard_is_read_once_and_nothing_else(targets, monkeypatch):
    """What is read for a device's experts is those experts; what all devices hold is read once."""
    read: list[str] = []
    original = Arrays.read_stored

    def counting(self, name, index=()):
        read.append(f"{name} {index[:2]}")
        return original(self, name, index)

    monkeypatch.setattr(Arrays, "read_stored", counting)
    kimi_jax.load(targets / "float32", mesh=mesh((2, 4), ("data", "expert")))
    gates = [r for r in read if "experts.gate" in r]
    assert len(gates) == len(set(gates)) == 8
    assert len(read) == len(set(read))


def test_experts_that_do_not_divide(targets):
    with pytest.raises(UserError, match="8 experts do not divide over 3 devices"):
        devices = np.asarray(jax.devices()[:3])
        kimi_jax.load(targets / "fp8", mesh=jax.sharding.Mesh(devices, "expert"))


def test_the_table(targets):
    _, params = kimi_jax.load(targets / "fp8", mesh=mesh((8, 1), ("data", "expert")))
    assert {w.sharding.spec for w in jax.tree.leaves(params)} <= {PartitionSpec(*[None] * n) for n in range(6)}
