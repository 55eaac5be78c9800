"""Plans at full scale, from the config alone, against the facts of the release; and for every layout of a source."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from kimi_jax import presets
from kimi_jax.checkpoint import safetensors
from kimi_jax.checkpoint.dry_run import dry_run
from kimi_jax.checkpoint.expected import Expected
from kimi_jax.checkpoint.units import CHUNK_BYTES, make_plan
from kimi_jax.errors import UserError
from tests.checkpoint.examples import BF16, CFG, FP8_CONFIG, quantised, random_tensors, save_hf
from tests.checkpoint.test_relatives import multimodal


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with config.json alone."""
    folder = tmp_path_factory.mktemp("released")
    (folder / "config.json").write_text(json.dumps(presets.kimi_k2_1t().to_hf() | FP8_CONFIG))
    return folder


def test_the_release(released, capsys):
    """139,644 tensors in 1,029,173,256,720 bytes, of which 61 small tensors are no parameters."""
    found = dry_run(released, "fp8", shares=64, workers=4)
    assert (found["tensors"], found["weights"], found["scales"], found["strays"]) == (139_644, 69_975, 69_608, 61)
    assert 0 < 1_029_173_256_720 - found["bytes"] <= 61 * 128
    assert found["bytes"] / 64 <= found["bytes_per_host"] < 1.05 * found["bytes"] / 64
    assert found["peak_bytes_per_host"] == 4 * found["peak_bytes_per_worker"] < 1 << 30
    assert "139,644 tensors" in capsys.readouterr().out
    assert dry_run(released, "bf16")["bytes"] == pytest.approx(2 * 1_026_408_232_448, rel=1e-3)


def test_an_index_is_compared(tmp_path):
    """Where the index is there already, every name of it is planned."""
    tensors = quantised(random_tensors())
    names = dict.fromkeys(tensors, "model-1-of-61.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_hf() | FP8_CONFIG))
    for change, message in (({}, None), ({"model.x": "a"}, "also names 1 tensors: model.x")):
        (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": names | change}))
        if message is None:
            assert dry_run(tmp_path, "fp8")["tensors"] == len(tensors) + CFG.num_hidden_layers
        else:
            with pytest.raises(UserError, match=message):
                dry_run(tmp_path, "fp8")
    del names["lm_head.weight"]
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UserError, match="lacks 1 tensors: lm_head.weight"):
        dry_run(tmp_path, "fp8")


def partly_quantised(folder):
    """fp8, but for the first layer."""
    tensors = {name: w.astype(BF16) for name, w in random_tensors().items()}
    some = {name: w for name, w in quantised(tensors).items() if "layers.0." not in name}
    return save_hf(folder, tensors | some, **FP8_CONFIG)


def with_strays(folder):
    """bf16, with tensors that are no parameters."""
    tensors = {name: w.astype(BF16) for name, w in random_tensors().items()}
    return save_hf(folder, tensors | {"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(2, BF16)})


@pytest.mark.parametrize("make", [partly_quantised, with_strays, lambda folder: multimodal(folder)[0]])
def test_an_index_plans_what_headers_do(tmp_path, make):
    source = make(tmp_path / "hf")
    expected = dry_run(source, "bf16")
    names = safetensors.read_headers(source)
    (source / safetensors.INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a")}))
    for file in source.glob("*.safetensors"):
        file.unlink()
    found = dry_run(source, "bf16")
    same = ("weights", "scales", "arrays", "chunks", "bytes", "peak_bytes_per_worker")
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}


@pytest.mark.parametrize("dtype", ["float32", "fp8"])
def test_chunks_of_the_release(released, dtype):
    """Every weight lies in exactly one unit for each of its rows; no chunk spans two experts or is too large."""
    plan = make_plan(Expected.open(released), dtype)
    rows: dict[str, list[tuple[int, int]]] = {}
    cells: set[tuple] = set()
    for number, unit in enumerate(plan.units):
        assert unit.number == number
        assert (unit.array, unit.cell) not in cells
        cells.add((unit.array, unit.cell))
        assert all(0 <= i < n for i, n in zip(unit.cell, plan.arrays[unit.array].grid, strict=True))
        if unit.stop:
            rows.setdefault(unit.entries[0].name, []).append((unit.start, unit.stop))
    assert len(cells) == sum(math.prod(spec.grid) for spec in plan.arrays.values())
    assert len(rows) == 69_975
    lengths = {unit.entries[0].name: unit.entries[0].shape[0] for unit in plan.units if unit.stop}
    for name, found in rows.items():
        starts, stops = zip(*sorted(found), strict=True)
        assert starts == (0, *stops[:-1]) and stops[-1] == lengths[name]
    for name, spec in plan.arrays.items():
        assert spec.chunk_bytes <= CHUNK_BYTES
        if "experts" in name and name.startswith("params"):
            assert spec.chunk[:2] == (1, 1)
    padded = sum(math.prod(spec.grid) * spec.chunk_bytes - spec.nbytes for spec in plan.arrays.values())
    assert padded < 1e-2 * plan.nbytes


def test_a_source_that_is_there(tmp_path):
    """Its headers say more than its config: here no projection of the first layer is quantised."""
    tensors = random_tensors()
    some = {n: w for n, w in quantised(tensors).items() if "layers.0." not in n}
    source = save_hf(tmp_path / "hf", tensors | some, **FP8_CONFIG)
    found = dry_run(source, "fp8")
    n_dense = sum("layers.0." in n and "_proj" in n for n in tensors)
    n_quantised = sum("_scale_inv" in n for n in some)
    assert (found["weights"], found["scales"]) == (len(tensors), n_quantised)
    assert n_dense and found["arrays"] == len(make_plan(Expected.open(source), "fp8").arrays) - n_dense
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_what_cannot_be_planned(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CFG.to_hf()))
    with pytest.raises(UserError, match="no fp8"):
        dry_run(tmp_path, "fp8")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        dry_run(tmp_path, "bf16")
    with pytest.raises(UserError, match="cannot read"):
        dry_run(tmp_path / "nowhere", "bf16")
