"""Hugging Face directories written from our checkpoints, against their own arrays and the definition of fp8."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

import kimi_jax
from kimi_jax.checkpoint import manager, weights
from kimi_jax.checkpoint.arrays import Arrays
from kimi_jax.checkpoint.convert import from_hf
from kimi_jax.checkpoint.export import MARKER, to_hf
from kimi_jax.checkpoint.safetensors import INDEX
from kimi_jax.checkpoint.safetensors_writer import write_file
from kimi_jax.checkpoint.verify import verify
from kimi_jax.config import ModelConfig
from kimi_jax.errors import UserError
from tests.checkpoint.examples import (
    BF16,
    CFG,
    FP8,
    FP8_CONFIG,
    quantised,
    random_params,
    random_tensors,
    read,
    same,
    save_hf,
    save_run,
    tensors_of,
)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
@pytest.mark.parametrize("shard_size", [20_000, 10**9])
def test_as_stored(tmp_path, dtype, shard_size):
    params = random_params(dtype)
    done = to_hf(save_run(tmp_path / "run", params), tmp_path / "hf", shard_size=shard_size)
    found, expected = read(tmp_path / "hf"), tensors_of(params)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in expected)
    assert done["tensors"] == len(expected) and done["bytes"] == sum(w.nbytes for w in expected.values())
    assert done["files"] == done["files_written"] == len(list((tmp_path / "hf").glob("*.safetensors")))
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert ModelConfig.from_hf(config).replace(dtype=CFG.dtype, param_dtype=CFG.param_dtype) == CFG
    assert config["torch_dtype"] == np.dtype(dtype).name and "quantization_config" not in config
    assert not list((tmp_path / "hf").glob("*unfinished*"))


@pytest.mark.parametrize("piece", [1, 200_000])
def test_pieces_of_any_size(tmp_path, monkeypatch, piece):
    """Rows cut at every block, within heads and at the ends of both input axes."""
    monkeypatch.setattr(weights, "PIECE_BYTES", piece)
    monkeypatch.setattr(weights.fp8, "BLOCK", (32, 32))
    params = random_params()
    to_hf(save_run(tmp_path / "run", params), tmp_path / "hf")
    found, expected = read(tmp_path / "hf"), tensors_of(params)
    assert all(same(found[name], expected[name]) for name in expected)


def test_large_arrays_of_a_run_are_stored_in_parts(tmp_path, monkeypatch):
    """One chunk never spans two layers, so that an export reads it once; the run itself restores it all the same."""
    monkeypatch.setattr(manager, "CHUNK_BYTES", 100_000)
    params = random_params()
    run = save_run(tmp_path / "run", params)
    chunks = Arrays.open(run / "checkpoints" / "5" / "state").chunk("params.moe_layers.moe.experts.up")
    assert chunks[0] == 1 and np.prod(chunks) * 4 <= 100_000
    to_hf(run, tmp_path / "hf")
    found, expected = read(tmp_path / "hf"), tensors_of(params)
    assert all(same(found[name], expected[name]) for name in expected)
    jax.tree.map(np.testing.assert_array_equal, manager.restore_params(run)[0], params)


def test_bf16(tmp_path):
    params = random_params()
    to_hf(save_run(tmp_path / "run", params), tmp_path / "hf", "bf16")
    for name, w in tensors_of(params).items():
        expected = w if name.endswith("e_score_correction_bias") else w.astype(BF16)
        assert same(read(tmp_path / "hf")[name], expected)


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_fp8_is_what_was_released(tmp_path, dtype):
    """Every projection in fp8 with f32 scales, the router's bias in f32, all else in bf16."""
    params = random_params(dtype)
    to_hf(save_run(tmp_path / "run", params), tmp_path / "hf", "fp8", shard_size=20_000)
    found, expected = read(tmp_path / "hf"), tensors_of(params)
    projections = {name for name in expected if "_proj" in name}
    assert len(projections) == 3 * 5 + 3 + 2 * 3 * (4 + 1)
    assert found.keys() == expected.keys() | {name + "_scale_inv" for name in projections}
    for name, w in expected.items():
        if name not in projections:
            assert same(found[name], w if name.endswith("bias") else w.astype(BF16))
            continue
        scale = found[name + "_scale_inv"]
        assert (found[name].dtype, scale.dtype) == (FP8, np.float32)
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                at = np.s_[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
                block = w[at].astype(np.float32)
                assert scale[i, j] == np.abs(block).max() / np.float32(448)
                assert found[name][at].tobytes() == (block / scale[i, j]).astype(FP8).tobytes()
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert config["quantization_config"] == {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    }  # fmt: skip


UP = "model.layers.2.mlp.experts.3.up_proj.weight"


def layouts(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Ways to lay tensors out in files: one; padded and unpadded numbers; a weight and its scales apart; one each."""
    names = list(tensors)
    half = {f"model-{i}-of-2.safetensors": {n: tensors[n] for n in names[i - 1 :: 2]} for i in (1, 2)}
    scales = {n for n in names if n.endswith("_scale_inv")}
    apart = {
        "model-00001-of-000002.safetensors": {n: tensors[n] for n in reversed(names) if n not in scales},
        "model-00002-of-000002.safetensors": {n: tensors[n] for n in names if n in scales},
    }
    single = {f"{n}.safetensors": {n: tensors[n]} for n in names}
    return {"whole": {"model.safetensors": tensors}, "half": half, "apart": apart, "single": single}


@pytest.mark.parametrize("layout, with_index", [("whole", False), ("half", True), ("apart", True), ("single", False)])
def test_fp8_there_and_back_is_identical(tmp_path, layout, with_index):
    """Every byte and every scale, and the tensors that are not fp8; the shards are laid out anew."""
    tensors = quantised(random_tensors())
    folder = save_hf(tmp_path / "source", {}, **FP8_CONFIG)
    (folder / "model.safetensors").unlink()
    files = layouts(tensors)[layout]
    for file, part in files.items():
        write_file(folder / file, part)
    if with_index:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    from_hf(folder, tmp_path / "converted", "fp8")
    to_hf(tmp_path / "converted", tmp_path / "back", shard_size=30_000)
    found = read(tmp_path / "back")
    assert found.keys() == tensors.keys()
    assert all(same(found[name], tensors[name]) for name in tensors)
    assert verify(folder, tmp_path / "back").same and verify(folder, tmp_path / "converted").same
    to_hf(tmp_path / "converted", tmp_path / "fp8", "fp8", shard_size=10**9)
    assert all(same(w, tensors[name]) for name, w in read(tmp_path / "fp8").items())


def test_blocks_of_another_size(tmp_path):
    """Kept fp8 brings its block, and what is quantised beside it takes the same."""
    block = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 16]}}
    tensors = quantised(random_tensors(), (32, 16))
    from_hf(save_hf(tmp_path / "source", tensors, **block), tmp_path / "converted", "fp8")
    to_hf(tmp_path / "converted", tmp_path / "back")
    assert all(same(w, tensors[name]) for name, w in read(tmp_path / "back").items())
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [32, 16]
    assert verify(tmp_path / "source", tmp_path / "back").same


def test_fp8_goes_out_as_bf16(tmp_path):
    tensors = quantised(random_tensors())
    from_hf(save_hf(tmp_path / "source", tensors, **FP8_CONFIG), tmp_path / "converted", "fp8")
    to_hf(tmp_path / "converted", tmp_path / "bf16", "bf16")
    found = read(tmp_path / "bf16")
    assert found.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
    scale = np.repeat(np.repeat(tensors[UP + "_scale_inv"], 128, 0), 128, 1)[:130, :136]
    assert same(found[UP], (tensors[UP].astype(np.float32) * scale).astype(BF16))
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert verify(tmp_path / "source", tmp_path / "bf16").same


def test_files_beside_the_weights(tmp_path):
    """What came with the source goes out as it came; config.json is ours, with the source's token ids."""
    ids = {"bos_token_id": 3, "eos_token_id": [4, 5]}
    folder = save_hf(tmp_path / "source", random_tensors(), auto_map={"AutoConfig": "x.Y"}, **ids)
    kept = {"tiktoken.model": b"\x00\xff", "tokenizer_config.json": b"{ }", "chat_template.jinja": b"{{ x }}"}
    kept |= {"generation_config.json": b'{"eos_token_id": 5}', "tokenization_kimi.py": b"pass"}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    from_hf(folder, tmp_path / "converted", "float32")
    to_hf(tmp_path / "converted", tmp_path / "back")
    assert {name: (tmp_path / "back" / name).read_bytes() for name in kept} == kept
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: config[key] for key in ids} == ids and "auto_map" not in config
    assert not list((tmp_path / "back").glob("*unfinished*"))


@pytest.mark.parametrize("named", [".", "tiktoken.model", "kimi.ranks"])
def test_a_run_with_a_tokenizer(tmp_path, named):
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok" / ("tiktoken.model" if named == "." else named)).write_bytes(b"ranks")
    (tmp_path / "tok" / "notes.txt").write_text("not the tokenizer's")
    to_hf(save_run(tmp_path / "run", random_params(), tokenizer=str(tmp_path / "tok" / named)), tmp_path / "hf")
    assert (tmp_path / "hf" / "tiktoken.model").read_bytes() == b"ranks"
    assert not (tmp_path / "hf" / "notes.txt").exists() and (tmp_path / "hf" / "generation_config.json").exists()


def test_a_run_whose_tokenizer_is_gone(tmp_path):
    """Said before anything is written; the folder is there, but not what it was named for."""
    (tmp_path / "tok").mkdir()
    for named, gone in (("tok", "tok/tiktoken.model"), ("ranks", "ranks")):
        run = save_run(tmp_path / f"run-{named}", random_params(), tokenizer=str(tmp_path / named))
        with pytest.raises(UserError, match=f"run-{named}.* with the tokenizer {tmp_path}/{gone}, which is not here"):
            to_hf(run, tmp_path / f"hf-{named}")
        assert [path.name for path in (tmp_path / f"hf-{named}").iterdir()] == [MARKER]


KILLED = """
import os, sys
from kimi_jax.checkpoint import safetensors_writer as writer
from kimi_jax.checkpoint.export import MARKER, to_hf

calls, pwrite = 0, os.pwrite
def dying(*args):
    global calls
    calls += 1
    if calls > int(sys.argv[3]):
        os.kill(os.getpid(), 9)
    return pwrite(*args)
writer.os.pwrite = dying
to_hf(sys.argv[1], sys.argv[2], "fp8", shard_size=100_000, workers=2)
"""


def test_killed_and_resumed(tmp_path):
    """kill -9 after some writes, three times on: files that are complete stay, the end is the same bytes."""
    source = save_run(tmp_path / "run", random_params())
    to_hf(source, tmp_path / "straight", "fp8", shard_size=100_000)
    expected = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    target, complete = tmp_path / "hf", []
    for writes in (0, 7, 40):
        command = [sys.executable, "-c", KILLED, str(source), str(target), str(writes)]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        complete.append({path.name: path.stat().st_mtime_ns for path in target.glob("*.safetensors")})
        assert not (target / INDEX).exists() and not (target / "config.json").exists()
        with pytest.raises(UserError):
            kimi_jax.load(target)
    assert len(complete[2]) > len(complete[1]) == len(complete[0]) == 0
    done = to_hf(source, target, "fp8", shard_size=100_000)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
    assert done["files_written"] == done["files"] - len(complete[2]) < done["files"]
    assert all((target / name).stat().st_mtime_ns == when for name, when in complete[2].items())
    assert to_hf(source, target, "fp8", shard_size=100_000)["files_written"] == 0  # it is complete


def stopped(monkeypatch, source, target, **options) -> None:
    """An export that fails before its first file is complete."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            to_hf(source, target, **options)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk(tmp_path, monkeypatch):
    """One line that names the file; no file, whole or not, is left; then it goes on."""
    source = save_run(tmp_path / "run", random_params())
    stopped(monkeypatch, source, tmp_path / "hf")
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {MARKER}
    to_hf(source, tmp_path / "hf")
    assert verify(source, tmp_path / "hf").same and not (tmp_path / "hf" / MARKER).exists()


def test_an_export_of_something_else_is_refused(tmp_path, monkeypatch):
    """Other weights, though of the same step and config; another dtype; another size of files."""
    params = random_params()
    source = save_run(tmp_path / "run", params)
    params["norm"] = params["norm"] + 1
    other = save_run(tmp_path / "other", params)
    stopped(monkeypatch, source, tmp_path / "hf")
    for wrong in (dict(source=other), dict(dtype="bf16"), dict(shard_size=7)):
        with pytest.raises(UserError, match="hf holds an unfinished export of something else"):
            to_hf(**(dict(source=source, target=tmp_path / "hf") | wrong))
    to_hf(source, tmp_path / "hf")
    for wrong in (dict(source=other), dict(dtype="bf16"), dict(shard_size=7)):
        with pytest.raises(UserError, match="hf is not empty"):
            to_hf(**(dict(source=source, target=tmp_path / "hf") | wrong))


def test_a_complete_export_that_lost_a_file(tmp_path):
    source, target = save_run(tmp_path / "run", random_params()), tmp_path / "hf"
    to_hf(source, target, shard_size=100_000)
    lost = sorted(target.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    for damage in (lost.unlink, lambda: lost.write_bytes(content[:-1])):
        damage()
        with pytest.raises(UserError, match=f"{lost} and 0 other files are missing or damaged: remove {target}"):
            to_hf(source, target, shard_size=100_000)
    lost.write_bytes(content)
    assert to_hf(source, target, shard_size=100_000)["files_written"] == 0


def test_two_at_once(tmp_path, monkeypatch):
    source, target = save_run(tmp_path / "run", random_params()), tmp_path / "hf"
    stopped(monkeypatch, source, target)
    with open(target / MARKER, "a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing .*hf"):
            to_hf(source, target)
    to_hf(source, target)


@pytest.mark.parametrize("path, bad", [("lm_head", np.nan), ("moe_layers.moe.experts.up", np.inf), ("norm", 3.4e38)])
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_weights_that_are_not_finite(tmp_path, path, bad, dtype):
    params = random_params()
    leaf = params
    for key in path.split("."):
        leaf = leaf[key]
    leaf[(-1,) * leaf.ndim] = bad
    name = {"lm_head": "lm_head.weight", "norm": "model.norm.weight"}.get(path, UP)
    with pytest.raises(UserError, match=f"{name} holds NaN or infinity, or what is too large for"):
        to_hf(save_run(tmp_path / "run", params), tmp_path / "hf", dtype)
    assert not list((tmp_path / "hf").glob("*.safetensors")) and not (tmp_path / "hf" / INDEX).exists()


def test_scale_that_is_not_finite(tmp_path):
    """Found on the way out too, if the converted checkpoint was damaged."""
    from_hf(save_hf(tmp_path / "source", quantised(random_tensors()), **FP8_CONFIG), tmp_path / "converted", "fp8")
    layer = tmp_path / "converted" / "state" / "scales.moe_layers.moe.experts.up" / "c" / "1"
    (chunk,) = (path for path in layer.rglob("*") if path.is_file())
    scales = np.frombuffer(chunk.read_bytes(), np.float32).copy()
    scales[-1] = np.nan
    chunk.write_bytes(scales.tobytes())
    for dtype in (None, "bf16"):
        with pytest.raises(UserError, match=f"{UP}.*NaN"):
            to_hf(tmp_path / "converted", tmp_path / "hf", dtype)
        (tmp_path / "hf" / MARKER).unlink()


def test_bad_requests(tmp_path):
    source = save_run(tmp_path / "run", random_params())
    with pytest.raises(UserError, match="dtype must be one of bf16, fp8, not int4"):
        to_hf(source, tmp_path / "hf", "int4")
    with pytest.raises(UserError, match="shard size must be at least 1"):
        to_hf(source, tmp_path / "hf", shard_size=0)
    with pytest.raises(UserError, match="nowhere.*no complete checkpoint"):
        to_hf(tmp_path / "nowhere", tmp_path / "hf")
    with pytest.raises(UserError, match="local folder, not to gs://bucket/x"):
        to_hf(source, "gs://bucket/x")
    assert not (tmp_path / "hf").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file: "):
        to_hf(source, tmp_path / "file")
    (tmp_path / "taken").mkdir()
    for content in ("", "[]", '{"metadata": {}}'):
        (tmp_path / "taken" / INDEX).write_text(content)
        with pytest.raises(UserError, match="taken is not empty"):
            to_hf(source, tmp_path / "taken")


def test_what_was_done(tmp_path):
    source = save_run(tmp_path / "run", random_params())
    done = to_hf(source, tmp_path / "hf")
    assert done["bytes_written"] == done["bytes"] > 0 and done["peak_rss_bytes"] > 10**7


@pytest.mark.parametrize(
    "changes",
    [
        dict(q_lora_rank=None, n_shared_experts=0),
        dict(first_k_dense_replace=0, num_hidden_layers=1),
        dict(first_k_dense_replace=2, num_hidden_layers=2),
        dict(
            first_k_dense_replace=2, num_hidden_layers=12, hidden_size=8, moe_intermediate_size=4, n_routed_experts=11
        ),
    ],
)
def test_other_models_of_the_family(tmp_path, changes):
    """No query latent, no shared expert; no dense layer, no MoE layer; more than ten of both."""
    cfg = CFG.replace(**changes)
    tensors = quantised(random_tensors(cfg))
    from_hf(save_hf(tmp_path / "source", tensors, cfg, **FP8_CONFIG), tmp_path / "converted", "fp8")
    to_hf(tmp_path / "converted", tmp_path / "back", shard_size=20_000)
    found = read(tmp_path / "back")
    assert found.keys() == tensors.keys() and all(same(found[name], tensors[name]) for name in tensors)
