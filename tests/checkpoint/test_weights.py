"""Rows of a checkpoint of any kind, against the transposed slices of its arrays."""

from __future__ import annotations

import numpy as np
import pytest

from kimi_jax.checkpoint import manager, units, weights
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.hf_names import plan
from kimi_jax.checkpoint.weights import open_weights, pieces
from kimi_jax.errors import UserError
from tests.checkpoint.examples import (
    BF16,
    CFG,
    FP8_CONFIG,
    quantised,
    random_params,
    random_tensors,
    same,
    save_hf,
    save_run,
    tensors_of,
)

ENTRIES = list(plan(CFG))


def ranges(rows: int, block: int) -> list[tuple[int, int]]:
    """All of it, and a few ranges that start at a block."""
    rng = np.random.default_rng(rows)
    starts = rng.choice(range(0, rows, block), 3)
    return [(0, rows), *((int(start), int(rng.integers(start + 1, rows + 1))) for start in starts)]


@pytest.mark.parametrize("chunk_bytes", [2_000, 20_000, 32 << 20])
@pytest.mark.parametrize("kind", ["hf", "converted", "run"])
def test_rows(tmp_path, monkeypatch, kind, chunk_bytes):
    """Whatever way the arrays are cut and their axes ordered."""
    monkeypatch.setattr(units, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(manager, "CHUNK_BYTES", chunk_bytes)
    params = random_params()
    expected = tensors_of(params)
    path = save_run(tmp_path / "run", params) if kind == "run" else save_hf(tmp_path / "hf", expected)
    if kind == "converted":
        from_hf(path, tmp_path / "converted", "float32")
        path = tmp_path / "converted"
    found = open_weights(path)
    assert found.cfg.replace(dtype=CFG.dtype, param_dtype=CFG.param_dtype) == CFG
    for entry in ENTRIES:
        assert found.dtype(entry) == np.float32
        for start, stop in ranges(entry.shape[0], 1):
            values, scale = found.read(entry, start, stop)
            assert scale is None and same(values, expected[entry.name][start:stop]), entry.name


@pytest.mark.parametrize("kind", ["hf", "converted"])
def test_rows_of_fp8(tmp_path, kind):
    tensors = quantised(random_tensors(), (32, 16))
    config = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    path = save_hf(tmp_path / "hf", tensors, **config)
    if kind == "converted":
        from_hf(path, tmp_path / "converted", "fp8")
        path = tmp_path / "converted"
    found = open_weights(path)
    assert found.block == (32, 16)
    for entry in ENTRIES:
        for start, stop in ranges(entry.shape[0], 32):
            values, scale = found.read(entry, start, stop)
            assert same(values, tensors[entry.name][start:stop])
            whole = tensors.get(entry.name + "_scale_inv")
            assert scale is whole is None or same(scale, whole[start // 32 : -(-stop // 32)])  # type: ignore


def test_scales_of_another_dtype_are_kept(tmp_path):
    tensors = {n: w.astype(BF16) if n.endswith("_scale_inv") else w for n, w in quantised(random_tensors()).items()}
    from_hf(save_hf(tmp_path / "hf", tensors, **FP8_CONFIG), tmp_path / "converted", "fp8")
    found = open_weights(tmp_path / "converted")
    for entry in ENTRIES:
        scale = found.read(entry, 0, entry.shape[0]).scale
        assert scale is None or same(scale, tensors[entry.name + "_scale_inv"])


@pytest.mark.parametrize("piece_bytes", [1, 30_000, 10**9])
@pytest.mark.parametrize("block", [1, 32, 128])
def test_pieces_cover_every_row_once_in_blocks(monkeypatch, piece_bytes, block):
    monkeypatch.setattr(weights, "PIECE_BYTES", piece_bytes)
    for entry in ENTRIES:
        found = list(pieces(entry, block))
        assert [row for start, stop in found for row in range(start, stop)] == list(range(entry.shape[0]))
        width = 4 * int(np.prod(entry.shape[1:]))
        assert all(start % block == 0 for start, _ in found)
        assert all((stop - start) * width <= piece_bytes or stop - start <= block for start, stop in found)


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_weights(tmp_path)


def test_arrays_of_another_shape(tmp_path):
    """A config that does not belong to the arrays."""
    path = save_run(tmp_path / "run", random_params())
    meta = path / "checkpoints" / "5" / "meta" / "metadata"
    meta.write_text(
        meta.read_text().replace('"kv_lora_rank":10', '"kv_lora_rank":11').replace('rank": 10', 'rank": 11')
    )
    with pytest.raises(UserError, match="dense_layers.attn.kv_a has shape .*, the config says"):
        open_weights(path)
