"""Comparison of checkpoints of every kind: what differs is found, and only that."""

from __future__ import annotations

import shutil

import fsspec
import numpy as np
import pytest

from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.inspect import inspect
from kimi_jax.checkpoint.verify import verify
from kimi_jax.errors import UserError
from tests.checkpoint.examples import (
    BF16,
    CFG,
    FP8,
    FP8_CONFIG,
    quantised,
    random_params,
    random_tensors,
    save_hf,
    save_run,
    tensors_of,
)

UP = "model.layers.2.mlp.experts.3.up_proj.weight"


def changed(tensors, name: str, by: float) -> dict[str, np.ndarray]:
    """With one element of one tensor moved."""
    w = tensors[name].copy()
    w[(-1,) * w.ndim] += by
    return tensors | {name: w}


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("digest", [False, True])
def test_a_run_and_a_directory(tmp_path, dtype, digest):
    params = random_params(dtype)
    run, folder = save_run(tmp_path / "run", params), save_hf(tmp_path / "hf", tensors_of(params))
    for a, b in ((run, folder), (folder, run / "checkpoints" / "5"), (run, run)):
        found = verify(a, b, digest=digest)
        assert found.same and (found.different, found.rounded) == (0, 0)
        assert (found.digests is not None) == digest and str(found).startswith(
            "digests are equal" if digest else "the same"
        )


@pytest.mark.parametrize("name", [UP, "lm_head.weight", "model.layers.1.mlp.gate.e_score_correction_bias"])
def test_one_element(tmp_path, name):
    tensors = random_tensors()
    a = save_hf(tmp_path / "a", tensors)
    b = save_hf(tmp_path / "b", changed(tensors, name, 0.5))
    found = verify(a, b)
    assert not found.same and (found.different, found.worst) == (1, name)
    assert found.max_difference == pytest.approx(0.5, abs=1e-6)
    assert name in str(found) and "1 of" in str(found)
    assert verify(a, b, tolerance=0.51).same and not verify(a, b, tolerance=0.49).same
    assert not verify(a, b, digest=True).same


def test_the_worst_is_named(tmp_path):
    tensors = random_tensors()
    other = changed(changed(changed(tensors, UP, 0.25), "model.norm.weight", -2), "lm_head.weight", 1)
    found = verify(save_hf(tmp_path / "a", tensors), save_hf(tmp_path / "b", other))
    assert (found.different, found.worst) == (3, "model.norm.weight")
    assert found.max_difference == pytest.approx(2, abs=1e-6)


def test_two_dtypes_are_the_same_if_rounding_makes_them_so(tmp_path):
    tensors = random_tensors()
    rounded = {name: w if name.endswith("bias") else w.astype(BF16) for name, w in tensors.items()}
    a, b = save_hf(tmp_path / "a", tensors), save_hf(tmp_path / "b", rounded)
    found = verify(a, b)
    assert found.same and found.rounded == len(tensors) - 2
    assert not verify(a, b, digest=True).same
    half = {name: w.astype(np.float16) for name, w in tensors.items()}
    rounded_half = {name: w.astype(BF16) for name, w in half.items()}
    pair = save_hf(tmp_path / "half", half), save_hf(tmp_path / "rounded_half", rounded_half)
    assert verify(*pair).same and verify(*reversed(pair)).same
    off = rounded | {UP: changed(tensors, UP, 0.1)[UP].astype(BF16)}
    found = verify(save_hf(tmp_path / "c", off), a)
    assert not found.same and (found.different, found.worst) == (1, UP)
    assert 0.09 < found.max_difference < 0.11


def test_fp8_bytes_and_scales(tmp_path):
    tensors = quantised(random_tensors())
    a = save_hf(tmp_path / "a", tensors, **FP8_CONFIG)
    q = tensors[UP].view(np.uint8).copy()
    q[-1, -1] ^= 1
    scale = tensors[UP + "_scale_inv"].copy()
    scale[-1, -1] = np.nextafter(scale[-1, -1], np.float32(9))
    assert verify(a, shutil.copytree(a, tmp_path / "same")).same
    for i, change in enumerate(({UP: q.view(FP8)}, {UP + "_scale_inv": scale})):
        b = save_hf(tmp_path / f"b{i}", tensors | change, **FP8_CONFIG)
        found = verify(a, b)
        assert not found.same and (found.different, found.worst) == (1, UP) and found.max_difference > 0
        assert not verify(a, b, digest=True).same


def test_a_copy_with_a_wrong_byte(tmp_path):
    """The digest is of the weights as they are, not of what was noted when they were written."""
    source = save_hf(tmp_path / "hf", quantised(random_tensors()), **FP8_CONFIG)
    from_hf(source, tmp_path / "t", "fp8")
    copy = shutil.copytree(tmp_path / "t", tmp_path / "copy")
    assert verify(tmp_path / "t", copy, digest=True).same
    chunk = copy / "state" / "params.moe_layers.moe.experts.up" / "c" / "1" / "2" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[7] ^= 1
    chunk.write_bytes(data)
    assert not verify(tmp_path / "t", copy, digest=True).same


def test_fp8_and_what_it_stands_for(tmp_path):
    tensors = quantised(random_tensors())
    exact = {}
    for name, w in tensors.items():
        if name + "_scale_inv" in tensors:
            scale = np.repeat(np.repeat(tensors[name + "_scale_inv"], 128, 0), 128, 1)[: w.shape[0], : w.shape[1]]
            exact[name] = w.astype(np.float32) * scale
        elif not name.endswith("_scale_inv"):
            exact[name] = w
    a = save_hf(tmp_path / "a", tensors, **FP8_CONFIG)
    for i, dtype in enumerate((np.float32, BF16)):
        other = {name: w if name.endswith("bias") else w.astype(dtype) for name, w in exact.items()}
        assert verify(a, save_hf(tmp_path / f"b{i}", other)).same


def test_weights_without_scales_have_no_blocks(tmp_path):
    tensors = quantised(random_tensors(), (32, 16))
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    source = save_hf(tmp_path / "source", tensors, **block)
    from_hf(source, tmp_path / "converted", "bf16")
    found = verify(source, tmp_path / "converted")
    assert found.same and found.rounded == sum(w.dtype == FP8 for w in tensors.values())


def test_a_bit_that_does_not_move_the_value(tmp_path):
    """Minus zero is another weight than zero, though no further away."""
    tensors = random_tensors()
    zero, minus = (np.full_like(tensors[UP], z) for z in (0.0, -0.0))
    found = verify(save_hf(tmp_path / "a", tensors | {UP: zero}), save_hf(tmp_path / "b", tensors | {UP: minus}))
    assert not found.same and (found.worst, found.max_difference) == (UP, 0)


def test_other_models(tmp_path):
    a = save_hf(tmp_path / "a", random_tensors())
    wider, fewer = CFG.replace(intermediate_size=22), CFG.replace(num_hidden_layers=2)
    b = save_hf(tmp_path / "b", random_tensors(wider), wider)
    with pytest.raises(UserError, match=r"different models.*layers.0.mlp.down_proj.weight with shape \(136, 22\)"):
        verify(a, b)
    c = save_hf(tmp_path / "c", random_tensors(fewer), fewer)
    with pytest.raises(UserError, match="the second has no model.layers.2"):
        verify(a, c)
    with pytest.raises(UserError, match="the first has no model.layers.2"):
        verify(c, a)


def test_damaged(tmp_path):
    tensors = random_tensors()
    a = save_hf(tmp_path / "a", tensors)
    b = save_hf(tmp_path / "b", tensors | {UP: tensors[UP] * np.nan})
    with pytest.raises(UserError, match=f"model.safetensors.*{UP}.*NaN"):
        verify(a, b)
    path = b / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors is truncated"):
        verify(a, b)
    with pytest.raises(UserError, match="nowhere"):
        verify(a, tmp_path / "nowhere")


def test_a_directory_that_is_not_local(tmp_path):
    a = save_hf(tmp_path / "a", random_tensors())
    remote = fsspec.filesystem("memory")
    remote.put(str(a), "/verify", recursive=True)
    try:
        assert verify("memory://verify", a).same and verify(a, "memory://verify", digest=True).same
        assert inspect("memory://verify").groups == inspect(a).groups
    finally:
        remote.rm("/verify", recursive=True)
